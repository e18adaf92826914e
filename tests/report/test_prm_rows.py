"""The rows of a learned reward in ``run_ttc``, chosen rows, merged runs."""

import json

import pytest
import torch

from tests.small_run import SCALE, undrawn, write_examples
from ttcfast.core.normalizer import Normalizer
from ttcfast.experiments.demo import run_demo
from ttcfast.experiments.run_ttc import RunTTCConfig, run_ttc
from ttcfast.rewards.prm.dense import DensePRM
from ttcfast.runtime.errors import ArgumentError, CheckpointError, DataError
from ttcfast.spec import TTCConfig
from ttcfast.stochastic_sampling.directions import LocalFields, save_directions

pytestmark = pytest.mark.usefixtures("figures_undrawn")


def write_prm(folder, in_ch=8):
    """A small dense reward with opinions: its last layer is not zero."""
    torch.manual_seed(1)
    norm = Normalizer(torch.tensor([1.0, 0.2, -0.1, 2.5]), SCALE, 0.1 * SCALE) if in_ch == 8 else None
    prm = DensePRM(in_ch, width=8, levels=2, normalizer=norm)
    torch.nn.init.normal_(prm.out.weight, std=0.05)
    prm.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("examples"), steps=3)


@pytest.fixture(scope="module")
def prm(tmp_path_factory):
    return write_prm(tmp_path_factory.mktemp("prm"))


def config(examples, out, **changes):
    values = {"checkpoint": str(examples / "surrogate.safetensors"), "data": (str(examples),), "out": str(out)}
    options = {"problems": 3, "steps": 3, "ttc": TTCConfig(branching_factor=3), "horizons": (1, 3), "solvers": ()}
    return RunTTCConfig(**{**values, **options, **changes})


@pytest.fixture(scope="module")
def run(examples, prm, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "prm"
    changes = {"prm": prm, "sweep": (1, 2), "sweep_problems": 2, "finetuned": str(examples / "surrogate.safetensors")}
    with undrawn():
        return run_ttc(config(examples, out, **changes), quiet=True), out


def test_rows_of_the_learned_reward_stand_beside_the_others_in_both_forms(run):
    evaluation = run[0].evaluation
    names = ["deterministic", "random", "mean", "symmetry_mean", "prm_corrector", "arm", "prm", "arm_prm", "residual"]
    names += ["prm_refined", "prm_symmetry"]
    rows = [(m, p) for m in [*names, "oracle", "finetuned"] for p in (False, True) if p or m != "prm_symmetry"]
    assert [(r.method, r.projected) for r in evaluation.rollouts if "solver" not in r.method] == rows
    for result in evaluation.results:
        assert result.mse.isfinite().all() and (not result.projected or result.final_drift("mass") < 1e-5)
    moved, chosen = evaluation.find("prm_refined"), evaluation.find("prm")
    assert (
        moved.evaluations == chosen.evaluations and moved.reward_evaluations == 3 * chosen.reward_evaluations
    )  # the ascent scores on its way
    assert not torch.allclose(moved.mse[:, 1], chosen.mse[:, 1])
    table = (run[1] / "table.md").read_text()
    assert "| ARM + PRM |" in table and "| PRM refined + projection |" in table and "moved 0.5 and 1 of a full step" in table


def test_the_sweep_has_lines_for_the_mean_and_every_reward(run):
    lines = {(line[0].method, tuple(r.branching_factor for r in line)) for line in run[0].sweep.lines()}
    assert lines == {(m, (1, 2, 3)) for m in ("mean", "arm", "prm", "arm_prm", "prm_refined", "oracle")}


def test_chosen_rows_of_one_run_join_those_of_another(run, examples, prm, tmp_path):
    first, folder = run
    changes = {"prm": prm, "methods": ("prm_span", "prm_softmax", "prm", "span_oracle"), "merge": (str(folder),)}
    merged = run_ttc(config(examples, tmp_path / "more", **changes), quiet=True).evaluation
    names = {r.method for r in first.evaluation.results} | {"prm_span", "prm_softmax", "span_oracle"}
    assert {r.method for r in merged.results} == names and merged.results[0].method == "persistence"
    for row in first.evaluation.results:
        torch.testing.assert_close(merged.find(row.method, projected=row.projected).mse, row.mse, rtol=1e-6, atol=0)
    assert merged.find("prm_span").trajectory is not None and merged.find("prm").trajectory is None
    assert any(str(folder) in note and "PRM refined + projection" in note for note in merged.notes)
    held = json.loads((tmp_path / "more" / "metrics.json").read_text())
    assert {m["method"] for m in held["methods"]} == names
    with pytest.raises(DataError, match=r"with B = 3 and this table has B = 2; run both with the same"):
        run_ttc(config(examples, tmp_path, ttc=TTCConfig(branching_factor=2), merge=(str(folder),)), quiet=True)
    with pytest.raises(DataError, match="other problems"):
        run_ttc(config(examples, tmp_path, problems=5, merge=(str(folder),)), quiet=True)
    with pytest.raises(DataError, match=r"nowhere/rows.json does not exist; make it again or leave it out"):
        run_ttc(config(examples, tmp_path, merge=("nowhere",)), quiet=True)


def test_demo_finds_the_shipped_reward_and_directions(tmp_path):
    examples = write_examples(tmp_path, steps=2)
    write_prm(tmp_path / "prm")
    fields = LocalFields(4, (True, True))
    fields.spread.normal_(std=0.1)
    save_directions(tmp_path / "directions.safetensors", fields, {})
    options = {"examples": examples, "branching_factor": 2, "steps": 2, "problems": 2, "sweep_problems": 1, "quiet": True}
    result = run_demo(tmp_path / "out", sweep=(1, 3), **options)
    names = {r.method for r in result.evaluation.results}
    assert (
        {"prm", "prm_corrector", "prm_symmetry"} < names
        and "arm_prm" not in names
        and {line[0].method for line in result.sweep.lines()} == {"arm", "prm", "oracle"}
    )
    other = run_demo(tmp_path / "other", sweep=(), checkpoint=examples / "surrogate.safetensors", **options)
    assert "prm" not in {r.method for r in other.evaluation.results}
    held = [json.loads((tmp_path / out / "metrics.json").read_text())["provenance"]["config"]["ttc"] for out in ("out", "other")]
    noise = [ttc["stochastic"] for ttc in held]
    assert noise[0]["directions"] == str(tmp_path / "directions.safetensors")
    assert (noise[0]["dropout"], noise[0]["directions_strength"]) == (False, 0)
    assert noise[1] is None  # the directions are the shipped surrogate's


def test_switches_act_on_every_row_with_a_reward(examples, prm, tmp_path):
    ttc = TTCConfig(branching_factor=3, refine_steps=2, refine_lengths=(1.0,))
    table = run_ttc(config(examples, tmp_path, prm=prm, ttc=ttc, projection=False), quiet=True).evaluation
    used = ["symmetry_mean", "prm_corrector", "arm", "prm", "arm_prm", "residual", "prm_symmetry"]
    assert [r.method for r in table.rollouts] == ["deterministic", "random", "mean", *used, "oracle"]
    # a candidate and two copies, each scored once: the two that are moved further by the ascent itself
    each = {r.method: r.reward_evaluations / (3 * 3 * 3) for r in table.rollouts}
    assert each == {
        **dict.fromkeys(("deterministic", "random", "mean", "symmetry_mean", "oracle"), 0),
        **dict.fromkeys(("arm", "arm_prm"), 2 + 3),
        "prm": 3,
        "residual": 1,
        "prm_corrector": 2 / 3,
        "prm_symmetry": 8 * 2 / 3,
    }
    assert any("all rows with a reward" in note for note in table.notes)


def test_wrong_rewards_and_methods(examples, prm, tmp_path):
    with pytest.raises(ValueError, match=r"prm is null and use_prm is true .* give prm.ckpt="):
        config(examples, tmp_path, reward="prm")
    with pytest.raises(ValueError, match="which contradict each other"):
        config(examples, tmp_path, reward="arm", prm=prm)
    with pytest.raises(ArgumentError, match=r"methods names prm_span, which needs the reward prm; there are arm.*; give prm.ckpt"):
        run_ttc(config(examples, tmp_path, methods=("arm", "prm_span")), quiet=True)
    with pytest.raises(ArgumentError, match="sweep_methods names prm; here there are mean, arm, residual, oracle"):
        run_ttc(config(examples, tmp_path, sweep=(2,), sweep_methods=("prm",)), quiet=True)
    with pytest.raises(CheckpointError, match="was trained for 2"):
        run_ttc(config(examples, tmp_path, prm=write_prm(tmp_path / "other", in_ch=4)), quiet=True)
