import csv
import json

import pytest
import torch

from tests.small_run import undrawn, write_examples
from ttcfast.experiments.demo import record_finetuned, run_demo
from ttcfast.experiments.run_ttc import RunTTCConfig, run_ttc
from ttcfast.runtime.errors import ArgumentError, DataError, OutputError
from ttcfast.runtime.logs import read_log
from ttcfast.spec import TTCConfig

FIGURES = [
    "calibration",
    "drift_branching",
    "drift_time",
    "error_branching",
    "error_seconds",
    "error_time",
    "fields_problem0",
    "fields_problem4",
]
FIGURES += ["gain_histogram"]
pytestmark = pytest.mark.usefixtures("figures_undrawn")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def demo(examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "demo"
    with undrawn():
        options = {"branching_factor": 3, "beam_width": 4, "sweep": (1, 2, 4), "sweep_problems": 2}
        return run_demo(out, examples=examples, steps=8, quiet=True, **options), out


def test_demo_writes_everything(demo):
    result, out = demo
    written = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    expected = [
        "calibration.csv",
        "calibration.json",
        "config.json",
        "fields.npz",
        "log.csv",
        "log.jsonl",
        "metrics.json",
        "rows.json",
        "summary.csv",
        "table.md",
        *(f"figures/{f}.png" for f in FIGURES),
        *(f"figures/{f}.svg" for f in FIGURES if not f.startswith("fields_")),  # lines alone
    ]
    assert written == sorted(expected)
    assert sorted(p.stem for p in result.figures) == FIGURES


def test_demo_metrics_are_those_of_the_evaluation(demo):
    result, out = demo
    held = json.loads((out / "metrics.json").read_text())
    assert held["problems"] == 8 and held["horizons"] == [1, 4]
    assert [m["method"] for m in held["methods"]] == [r.method for r in result.evaluation.results]
    assert {row["branching_factor"] for row in held["sweep"]["rows"]} == {1, 2, 3, 4}
    assert held["provenance"]["config"]["ttc"]["branching_factor"] == 3 and held["provenance"]["seeds"] == {"ttc.seed": 0}
    assert any("left out" in note for note in held["notes"])


def test_demo_has_the_row_of_a_beam_search_with_projection_alone(demo):
    rows = [r for r in demo[0].evaluation.results if r.method.startswith("arm_")]
    assert [(r.method, r.projected, r.beam_width, r.branching_factor) for r in rows] == [("arm_beam", True, 4, 4)]
    assert "| ARM beam k = 4 + projection |" in (demo[1] / "table.md").read_text()


def test_calibration_is_a_table_and_a_figure_which_the_next_run_there_replaces_or_removes(examples, tmp_path):
    def run(**changes):
        common = {"checkpoint": str(examples / "surrogate.safetensors"), "data": (str(examples),), "out": str(tmp_path)}
        common |= {"problems": 2, "steps": 2, "horizons": (1, 2), "ttc": TTCConfig(branching_factor=3), "methods": ("arm",)}
        return run_ttc(RunTTCConfig(**{**common, **changes}), quiet=True)

    files = [tmp_path / name for name in ("calibration.json", "calibration.csv", "figures/calibration.png", "frontier.csv")]
    result = run(calibration=4, frontier=(2,), frontier_problems=1)
    assert files[2] in result.figures and all(path.is_file() for path in files)
    rows = list(csv.DictReader(files[1].open()))
    counts = {form: sum(int(row["count"]) for row in rows if row["form"] == form) for form in ("all", "within")}
    assert {row["reward"] for row in rows} == {"arm"} and counts == {"all": 12, "within": 12}  # 4 states, 3 candidates each
    assert [sorted({int(row["bin"]) for row in rows if row["form"] == form}) for form in counts] == [list(range(10)), [0, 1, 2]]
    assert files[2] not in run(calibration=0).figures and not any(path.exists() for path in files)


def test_demo_logs_every_step(demo):
    result, out = demo
    entries = read_log(out)
    assert entries[3]["step"] == 4
    assert entries[3]["mse/arm_projected"] == pytest.approx(result.evaluation.find("arm", projected=True).mse_at(4))
    assert any("gain/arm_projected" in e for e in entries) and any("figures/error_time" in e for e in entries)


def test_demo_prints_the_table_and_where_the_figures_are(examples, tmp_path, capsys):
    run_demo(tmp_path, examples=examples, branching_factor=2, steps=2, sweep=(), problems=2)
    text = capsys.readouterr().out
    assert "2 test trajectories, 2 steps, B = 2" in text
    assert "persistence" in text and "solver 16x16" in text and "mean of surrogate and solver" in text
    assert "random candidate" not in text and "random candidate" in (tmp_path / "table.md").read_text()
    lines = [line.strip() for line in text.splitlines()]
    assert sum(line.startswith("ARM") for line in lines) == sum(line.startswith("ARM + projection") for line in lines) == 1
    assert str(tmp_path / "figures" / "error_time.png") in text
    assert not (tmp_path / "figures" / "error_branching.png").exists()


def test_the_same_seed_gives_the_same_numbers(demo, examples, tmp_path):
    again = run_demo(tmp_path, examples=examples, branching_factor=3, beam_width=4, steps=8, sweep=(), quiet=True)
    for a, b in zip(demo[0].evaluation.results, again.evaluation.results, strict=True):
        torch.testing.assert_close(a.mse, b.mse, rtol=1e-5, atol=1e-9)


def test_recorded_row_stands_in_the_table(examples, tmp_path):
    folder = tmp_path / "examples"
    folder.mkdir()
    for path in examples.iterdir():
        (folder / path.name).symlink_to(path)
    record_finetuned(examples / "surrogate.safetensors", {"note": "90 s on the reward split"}, examples=folder, problems=3, steps=4)
    result = run_demo(tmp_path / "out", examples=folder, branching_factor=2, steps=3, sweep=(), problems=2, quiet=True)
    raw, projected = result.evaluation.results[-2:]
    assert raw.name == "fine-tuned surrogate" and raw.recorded == "90 s on the reward split" and projected.projected
    assert raw.mse.shape == (2, 4)
    torch.testing.assert_close(raw.mse, result.evaluation.baseline.mse, rtol=1e-4, atol=1e-9)
    assert "fine-tuned surrogate (recorded)" in (tmp_path / "out" / "table.md").read_text()


def test_run_ttc_beyond_the_data_with_a_finetuned_checkpoint(examples, tmp_path):
    config = RunTTCConfig(
        checkpoint=str(examples / "surrogate.safetensors"),
        data=(str(examples / "test_1.hdf5"),),
        out=str(tmp_path),
        problems=2,
        steps=10,
        ttc=TTCConfig(branching_factor=2),
        finetuned=str(examples / "surrogate.safetensors"),
        tensorboard=True,
        horizons=(1, 9, 64),
    )
    result = run_ttc(config, quiet=True)
    assert [r.method for r in result.evaluation.results[-2:]] == ["finetuned"] * 2 and result.sweep is None
    torch.testing.assert_close(result.evaluation.results[-2].mse, result.evaluation.baseline.mse)
    held = json.loads((tmp_path / "metrics.json").read_text())
    assert held["horizons"] == [1, 9] and held["methods"][0]["mse_step_9"] is None and held["scored_steps"] == 8
    assert list((tmp_path / "tensorboard").iterdir())


def test_wrong_input_gives_one_clear_error(examples, tmp_path):
    with pytest.raises(ArgumentError, match="examples=<folder>"):
        run_demo(tmp_path, examples=tmp_path / "nowhere")
    with pytest.raises(DataError, match="one surrogate"):
        run_demo(tmp_path, examples=tmp_path)
    with pytest.raises(DataError, match="9 trajectories asked for"):
        run_demo(tmp_path, examples=examples, problems=9)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        run_demo(tmp_path / "file" / "out", examples=examples)
    with pytest.raises(ArgumentError, match="device is 'abc'"):
        run_demo(tmp_path, examples=examples, device="abc")
    with pytest.raises(ValueError, match="steps is 0"):
        run_demo(tmp_path, examples=examples, steps=0)
