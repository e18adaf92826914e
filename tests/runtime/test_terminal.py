import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from ttcfast.runtime.terminal import any_stdout, fits, plain_console, print_whole, wrapped

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("encoding", "wanted"), [("ascii", "- -1 3 +- 1 x2 a\\u4e2d"), ("latin-1", "- -1 3 ± 1 ×2 a\\u4e2d")])
def test_what_an_encoding_lacks_is_written_in_ascii(monkeypatch, encoding, wanted):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with any_stdout():
        print("– −1 3 ± 1 ×2 a中", end="")
    assert raw.getvalue().decode(encoding) == wanted
    assert sys.stdout is stream and stream.errors == "strict"


def said(**options) -> subprocess.CompletedProcess:
    code = (
        "import sys\nfrom ttcfast.cli import main\nmain._run = lambda given: print('3 \\u2013 4 \\xb1') or 0\nsys.exit(main.main(['info']))"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, timeout=120, check=False, **options)


def test_the_c_locale_is_one_of_those_encodings():
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env.pop("PYTHONIOENCODING", None)
    ran = said(env=env, stdout=subprocess.PIPE)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"3 - 4 +-\n", b"")


def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        ran = said(stdout=full)
    assert ran.returncode == 1
    assert ran.stderr.decode().splitlines() == [
        "ttcfast: cannot write to stdout: No space left on device; send it elsewhere. What is in files is kept"
    ]


def test_a_file_name_that_is_no_utf_8_can_be_printed(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    with any_stdout():
        print(os.fsdecode(b"run\xff"), end="")
    assert raw.getvalue() == b"run\\udcff"


def test_work_goes_on_after_its_reader_has_gone(tmp_path):
    """``| head -1``: everything after the first line is computed and kept all the same, and no trace is shown at the end."""
    code = (
        "import sys, pathlib\nfrom ttcfast.runtime.terminal import any_stdout\nwith any_stdout():\n"
        "    for i in range(20000): print('line', i)\n    pathlib.Path(sys.argv[1]).write_text('done')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "kept")], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(60) == 0 and said == b""
    assert (tmp_path / "kept").read_text() == "done"


def test_words_stay_whole_in_a_terminal_of_any_width(monkeypatch):
    for width in (1, 30, 80, 400):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = wrapped("some words that are not long " * 9, "  ", "    ")
        assert " ".join(" ".join(lines).split()) == ("some words that are not long " * 9).strip()
        assert max(map(len, lines)) <= min(98, max(20, width - 2)) and lines[0].startswith("  some") and lines[1].startswith("    ")


def test_names_are_no_markup():
    shown = io.StringIO()
    console = plain_console(Console(file=shown, width=40))
    table = Table(title="[old] t")
    table.add_column("[/x]")
    table.add_row(":smile: [red]a")
    print_whole(console, table)
    console.print("[/nope] [old] run")
    assert all(name in shown.getvalue() for name in ("[old] t", "[/x]", ":smile: [red]a", "[/nope] [old] run"))


def test_a_table_fits_a_terminal_or_not_and_a_file_always():
    table = Table()
    table.add_column("x" * 60, no_wrap=True)
    assert not fits(Console(file=io.StringIO(), width=40, force_terminal=True), table)
    assert fits(Console(file=io.StringIO(), width=80, force_terminal=True), table)
    assert fits(Console(file=io.StringIO(), width=40), table)
