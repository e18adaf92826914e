import io
import threading

from ttcfast.runtime import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_is_silent_away_from_a_terminal(capsys):
    assert list(progress.bar([3, 4], "generate")) == [3, 4]
    with progress.bar(2, "train") as bar:
        bar.advance(note="loss 1")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_nested_bars_show_on_a_terminal_and_close_after_an_error(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    try:
        for _ in progress.bar(2, "outer"):
            with progress.bar(3, "inner") as bar:
                bar.advance(3, note="loss 0.5")
                raise KeyError
    except KeyError:
        pass
    assert "outer" in terminal.getvalue() and "inner" in terminal.getvalue() and "loss 0.5" in terminal.getvalue()
    assert progress._shared._progress is None


def test_a_still_bar_is_drawn_by_no_thread_and_leaves_a_file_what_is_printed(monkeypatch):
    terminal, file = Terminal(), io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("sys.stdout", file)
    monkeypatch.setenv("TERM", "xterm")
    before = threading.active_count()
    with progress.bar(2, "bench", still=True) as bar:
        assert threading.active_count() == before
        print("a row")
        bar.advance()
        assert "1/2" in terminal.getvalue()
    assert file.getvalue() == "a row\n" and "a row" not in terminal.getvalue()
