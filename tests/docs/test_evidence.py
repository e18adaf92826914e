"""The keeper of measured tables: records, blocks, a changed digit, claims that are run again."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("evidence", ROOT / "docs" / "evidence.py")
evidence = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(evidence)


def row(method, projection, errors, over, **more):
    found = {"method": method, "projection": projection, "seconds": 12.3, "evaluations": 128, "reward_evaluations": 0, "solver_steps": 0}
    for h, (value, low, high) in errors.items():
        found |= {f"mse_step_{h}": value, f"mse_step_{h}_low": low, f"mse_step_{h}_high": high}
    return {**found, "over": {"deterministic": over}, "mse_by_step": [0.0] * 9, "per_problem": {}, **more}


def metrics(ratio=(0.5, 0.4, 0.6)):
    still = row("deterministic", False, {1: (0.1, 0.08, 0.12), 4: (0.4, 0.3, 0.5)}, {"1": [1, 1, 1], "4": [1, 1, 1]})
    moved = row(
        "prm_symmetry", True, {1: (0.08, 0.07, 0.09), 4: (0.2, 0.15, 0.25)}, {"1": [0.8, 0.7, 0.9], "4": list(ratio)}, evaluations=1024
    )
    about = {"git": {"commit": "abc"}, "versions": {"torch": "2.13"}, "host": {"cpu": "x"}, "time": "now"}
    return {"problems": 64, "steps": 4, "horizons": [1, 4], "notes": ["a note"], "methods": [still, moved], "provenance": about}


@pytest.fixture
def kept(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text(json.dumps(metrics()))
    command = "ttcfast run_ttc fm.ckpt=a data.root=data/euler64 out=runs/x"
    data = ["ttcfast generate split=test seed=3 out=data/euler64"]
    evidence.record("euler", run, command=command, data=data, claims=["prm_symmetry+p"], folder=tmp_path / "evidence")
    return tmp_path


def test_a_table_says_what_the_run_measured(kept):
    text = evidence.table("euler", "rows=deterministic,prm_symmetry+p steps=1,4", kept / "evidence")
    lines = text.splitlines()
    assert lines[0].split(" | ")[1:4] == ["error at step 1", "error at step 4", "over deterministic, step 4"]
    assert lines[2] == "| deterministic | 0.1 | 0.4 [0.3, 0.5] | 1 | 12 | 0.5 / 0 / 0 |"
    assert lines[3].endswith("| 0.08 | 0.2 [0.15, 0.25] | 0.50 [0.40, 0.60] | 12 | 4 / 0 / 0 |") and lines[3].startswith("| PRM")
    held = json.loads((kept / "evidence" / "euler.json").read_text())
    assert "mse_by_step" not in held["rows"][0] and held["about"]["git"]["commit"] == "abc"


def test_blocks_are_rewritten_and_a_changed_digit_is_found(kept):
    page = kept / "README.md"
    page.write_text("before\n<!-- evidence: euler rows=prm_symmetry+p -->\n<!-- end -->\nafter\n")
    assert evidence.tables(kept, kept / "evidence") == [page] and evidence.tables(kept, kept / "evidence") == []
    evidence.check(kept, kept / "evidence")
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
    page.write_text(page.read_text().replace("0.50 [", "0.40 ["))
    with pytest.raises(evidence.EvidenceError, match=r"README\.md: the table of euler"):
        evidence.check(kept, kept / "evidence")


@pytest.mark.parametrize(
    "name, options, said",
    [("moon", "", "moon is not recorded; there are euler"), ("euler", "rows=arm", "no arm"), ("euler", "steps=7", "step 7")]
    + [("euler", "colour=red", "option colour=red")],
)
def test_a_wrong_block_is_one_line(kept, name, options, said):
    with pytest.raises(evidence.EvidenceError, match=said):
        evidence.table(name, options, kept / "evidence")


@pytest.mark.parametrize(
    "ratio, holds, how", [((0.55, 0.5, 0.7), True, "inside"), ((0.7, 0.55, 0.8), True, "overlap"), ((0.9, 0.8, 1.0), False, "outside")]
)
def test_claims_are_run_again_on_data_of_another_seed(kept, ratio, holds, how):
    ran = []

    def run(arguments):
        ran.append(arguments)
        if "run_ttc" in arguments:
            out = Path(next(a[4:] for a in arguments if a.startswith("out=")))
            out.mkdir(parents=True)
            (out / "metrics.json").write_text(json.dumps(metrics(ratio)))

    ((claim, held, words),) = evidence.rerun("euler", 5, kept / "again", run=run, folder=kept / "evidence")
    assert (claim, held) == ("prm_symmetry+p", holds) and how in words
    made, used = ran
    assert made == ["ttcfast", "generate", "split=test", f"out={kept / 'again' / 'data0'}", "seed=5"]
    assert used == ["ttcfast", "run_ttc", "fm.ckpt=a", f"data.root={kept / 'again' / 'data0'}", f"out={kept / 'again' / 'run'}"]


def test_wrong_records_are_named(kept, tmp_path):
    with pytest.raises(evidence.EvidenceError, match=r"no metrics\.json"):
        evidence.record("x", tmp_path / "nothing", command="", data=[], claims=[], folder=tmp_path)
    with pytest.raises(evidence.EvidenceError, match="claims names arm"):
        evidence.record("x", kept / "run", command="", data=[], claims=["arm"], folder=tmp_path)
    with pytest.raises(evidence.EvidenceError, match="not empty"):
        evidence.rerun("euler", 1, kept, run=print, folder=kept / "evidence")


def test_a_command_that_reads_other_data_is_refused_before_anything_runs(kept):
    path = kept / "evidence" / "euler.json"
    path.write_text(path.read_text().replace("data.root=data/euler64", "data.root=data/other64"))
    with pytest.raises(evidence.EvidenceError, match="does not read data/euler64"):
        evidence.rerun("euler", 5, kept / "again", run=lambda parts: pytest.fail("ran"), folder=kept / "evidence")


def test_the_tables_of_this_checkout_are_those_of_its_records():
    evidence.check()


def test_a_commands_own_table_is_kept_as_it_stands(kept):
    folder, page = kept / "evidence", kept / "README.md"
    (folder / "agents.md").write_text("| a |\n|---|\n| 1 |\n")
    page.write_text("before\n<!-- table: agents -->\nold\n<!-- end -->\nafter\n")
    with pytest.raises(evidence.EvidenceError, match="the table of agents is not its record's"):
        evidence.check(kept, folder)
    evidence.tables(kept, folder)
    evidence.check(kept, folder)
    assert page.read_text() == "before\n<!-- table: agents -->\n| a |\n|---|\n| 1 |\n<!-- end -->\nafter\n"
    (folder / "agents.md").write_text("| a | b | c |\n|---|---|---:|\n| 1 | 2 | 3 |\n\na note\n")
    page.write_text("<!-- table: agents 3 1 -->\n<!-- end -->\n")
    evidence.tables(kept, folder)
    assert page.read_text() == "<!-- table: agents 3 1 -->\n| c | a |\n| ---: | --- |\n| 3 | 1 |\n<!-- end -->\n"
    (folder / "agents.md").write_text("| a | b |\n|---|---|\n| 1 | 2 |\n\n| a | c |\n|---|---|\n| 1 | 3 |\n\n* a note\n")
    page.write_text("<!-- table: agents 1 4 2 -->\n<!-- end -->\n")
    evidence.tables(kept, folder)
    assert "| a | c | b |\n| --- | --- | --- |\n| 1 | 3 | 2 |\n" in page.read_text(), "columns of a second table are counted on"
    page.write_text("<!-- table: others -->\n<!-- end -->\n")
    with pytest.raises(evidence.EvidenceError, match="others is not there; there are agents"):
        evidence.check(kept, folder)
