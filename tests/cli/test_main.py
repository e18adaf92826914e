import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ttcfast.cli.commands import COMMANDS
from ttcfast.cli.configuration import compose
from ttcfast.cli.main import main
from ttcfast.data import TrajectoryFile

ROOT = Path(__file__).resolve().parents[2]


def said(capsys) -> str:
    """The one line on stderr."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("ttcfast: "), text
    return text


def test_help_lists_the_commands_and_nothing_that_does_not_exist(capsys):
    assert main(["help"]) == 0
    text = capsys.readouterr().out
    assert set(COMMANDS) == {path.stem for path in (ROOT / "ttcfast" / "cli").glob("*.py")} - {
        *("__init__", "main", "commands", "completion", "configuration", "failures", "layout", "multirun", "typed"),
    }
    assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("width", [80, 100])
def test_a_commands_help_prints_its_keys(capsys, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert text.startswith(f"ttcfast {command}: ") and len(lines) <= 45 and max(map(len, lines)) <= width
    example = text.partition("\nExample: ")[2].partition("\n\n")[0].replace("\\\n", " ")
    program, named, *arguments = shlex.split(example)
    assert (program, named) == ("ttcfast", command) and compose(command, arguments) is not None


def test_help_writes_values_as_arguments_take_them(capsys):
    assert main(["run_ttc", "--help"]) == 0
    text = capsys.readouterr().out
    assert "\n  eval. rollout_T=20  methods=null" in text and "horizons=[1,4,16,20,64,128]" in text
    assert "\n  ttc.stochastic. dropout=true" in text and "prm.ckpt for" in text


def test_no_command_is_a_bad_argument(capsys):
    assert main([]) == 2
    assert main(["generat"]) == 2
    assert "did you mean generate?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("generate frmes=3", 2, "unknown key 'frmes'; did you mean 'frames'"),
        ("generate frames=1", 2, "frames is 1; it must be at least 2"),
        ("generate presets=[riemann5]", 2, "'riemann5'; it must be one of"),
        ("generate out=/dev/null/x n=3", 1, "cannot write to folder /dev/null/x"),
        ("run_ttc fm.ckpt=x ttc.branching_factor=0", 2, "ttc.branching_factor is 0; it must be at least 1"),
        ("run_ttc fm.ckpt=x eval.rollout_T=0", 2, "eval.rollout_T is 0; it must be at least 1"),
        ("run_ttc", 2, "fm.ckpt is not given"),
        ("run_ttc fm.ckpt=x use_prm=true", 2, "use_prm is true (reward.type=prm); give prm.ckpt="),
        ("run_ttc fm.ckpt=x use_prm=false prm.ckpt=y", 2, "use_prm is false (reward.type=arm), which contradict each other"),
        ("run_ttc fm.ckpt=x out=/dev/null/x", 1, "cannot write to folder /dev/null/x"),
        ("train_fm steps=0", 2, "steps is 0; it must be at least 1"),
        ("train_fm out=/dev/null/x", 1, "cannot write to folder /dev/null/x"),
        ("demo out=/dev/null/x", 1, "cannot write to folder /dev/null/x"),
        ("demo steps=0 checkpoint=x out={tmp}", 2, "steps is 0; it must be at least 1"),
        ("demo branching_factor=0 checkpoint=x out={tmp}", 2, "branching_factor is 0; it must be at least 1"),
    ],
)
def test_wrong_input_is_one_line_and_a_status(capsys, tmp_path, arguments, status, message):
    assert main(arguments.format(tmp=tmp_path).split()) == status
    assert message in said(capsys)


def test_debug_shows_the_trace(capsys):
    assert main(["--debug", "generate", "frames=1"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_unforeseen_error_is_one_line_too(capsys, monkeypatch):
    monkeypatch.setattr("ttcfast.ops.info", lambda: 1 / 0)
    assert main(["info"]) == 1
    assert "ZeroDivisionError: division by zero; --debug shows where" in said(capsys)


def test_info_prints_the_backends(capsys):
    assert main(["info"]) == 0
    assert "reference" in capsys.readouterr().out


SMALL = ["grid=8", "frames=3", "t_end=0.05", "presets=[riemann4]", "per_file=2", "batch=2"]
TINY = [
    *(f"model.{size}" for size in ("patch=4", "width=8", "depth=1", "heads=2", "refine=2")),
    "batch=2",
    "valid=2",
    "warmup=0",
    "lr=0.01",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data set of 8x8 cells with all four splits, made by the command."""
    out = tmp_path_factory.mktemp("data")
    assert main(["generate", *SMALL, f"out={out}", "n=4", "split=train"]) == 0
    assert main(["generate", *SMALL, f"out={out}", "n=2", "split=valid"]) == 0
    assert main(["generate", *SMALL, f"out={out}", "n=2", "split=test"]) == 0
    return out


def test_generate_writes_files_and_their_provenance(data, capsys):
    files = sorted((data / "data" / "train").glob("*.hdf5"))
    assert [len(TrajectoryFile(file)) for file in files] == [2, 2]
    record = json.loads((data / "generate_train.provenance.json").read_text())
    assert record["config"]["grid"] == 8 and record["seeds"] == {"seed": 0}
    before = [file.read_bytes() for file in files]
    assert main(["generate", *SMALL, f"out={data}", "n=4", "split=train"]) == 0  # all there: nothing is made again
    assert [file.read_bytes() for file in files] == before


def test_a_damaged_data_file_is_one_line(data, tmp_path, capsys):
    whole = next((data / "data" / "train").glob("*.hdf5")).read_bytes()
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "a.hdf5").write_bytes(whole[: len(whole) // 2])
    assert main(["train_fm", f"data={tmp_path}", f"out={tmp_path / 'out'}"]) == 1
    assert "a.hdf5" in said(capsys)
    assert main(["train_fm", f"data={tmp_path / 'none'}", f"out={tmp_path / 'out'}"]) == 1
    assert "none does not exist; give a data file or a folder" in said(capsys)


@pytest.mark.usefixtures("figures_undrawn")
def test_train_and_run_ttc_work_on_their_own_files(data, tmp_path, capsys):
    often = ["steps=3", "val_every=3", "save_every=2", "log_every=1"]
    assert main(["train_fm", f"data={data}", f"out={tmp_path / 'fm'}", *TINY, *often]) == 0
    checkpoint = tmp_path / "fm" / "surrogate.safetensors"
    assert str(checkpoint) in capsys.readouterr().out
    run = [f"fm.ckpt={checkpoint}", f"data.root={data}", "eval.rollout_T=3", "ttc.branching_factor=3", "use_prm=false", "eval.sweep=[1,2]"]
    assert main(["run_ttc", *run, f"out={tmp_path / 'ttc'}"]) == 0
    for name in ("metrics.json", "summary.csv", "run_ttc.yaml", "run_ttc.provenance.json"):
        assert (tmp_path / "ttc" / name).is_file()
    assert list((tmp_path / "ttc").rglob("*.png"))

    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(checkpoint.read_bytes()[:100])
    capsys.readouterr()
    assert main(["run_ttc", *run, f"fm.ckpt={damaged}", f"out={tmp_path / 'no'}"]) == 1
    assert "damaged.safetensors is damaged" in said(capsys)


def test_a_command_is_a_module_too(capsys, monkeypatch):
    message = "ttcfast: frames is 1; it must be at least 2\n"
    command = [sys.executable, "-m", "ttcfast.cli.main", "generate", "frames=1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (2, message)
    monkeypatch.setattr(sys, "argv", ["generate", "frames=1"])
    monkeypatch.delitem(sys.modules, "ttcfast.cli.generate", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("ttcfast.cli.generate", run_name="__main__")
    assert (ended.value.code, capsys.readouterr().err) == (2, message)


def test_bench_runs_the_group(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("ttcfast.cli.bench.ROOT", tmp_path)
    assert main(["bench"]) == 2
    assert "no bench folder" in said(capsys)
    (tmp_path / "bench").mkdir()
    for name in ("__init__", "bench_arm"):  # a package as the checkout's is, which it would not go before otherwise
        (tmp_path / "bench" / f"{name}.py").touch()
    program = "import sys\nopen('told', 'w').write(repr(sys.argv[1:]))\nsys.exit('--bad' in sys.argv)\n"
    (tmp_path / "bench" / "__main__.py").write_text(program)
    assert main(["bench", "args=\"--case 'N1 *' --quick\""]) == 0
    assert (tmp_path / "told").read_text() == "['arm', '--case', 'N1 *', '--quick']"
    capsys.readouterr()
    assert main(["bench", "op=topk"]) == 2
    assert "op is 'topk'; it must be one of arm" in said(capsys)
    assert main(["bench", "op=all", "args=--bad"]) == 1
    assert "-m bench all --bad ended with status 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (lambda: "–".encode("ascii"), 1),
        (lambda: json.loads("{"), 1),
        (lambda: int("x"), 1),
        (lambda: __import__("ttcfast.spec", fromlist=["at_least"]).at_least("n", 0, 1), 2),
    ],
)
def test_only_our_own_checks_are_bad_arguments(capsys, monkeypatch, failure, status):
    monkeypatch.setattr("ttcfast.ops.info", failure)
    assert main(["info"]) == status
    said(capsys)


def test_a_removed_current_folder_is_told(capsys, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["info"]) == 1
    assert "the current folder cannot be used" in said(capsys)
