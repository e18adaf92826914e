"""The table, the verdict, the scores, the figures and the page of policies trained inside world models."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from ttcfast.evaluation.table import markdown_table
from ttcfast.pwm.evaluation.imagination import ImaginationErrors
from ttcfast.pwm.policy_result import Evaluation, PolicyResult
from ttcfast.report.compare import CompareConfig, compare
from ttcfast.report.figures.policies import learning_curves, performance_profile, policy_figures
from ttcfast.report.figures.style import svg_of
from ttcfast.report.page.policies import gathered
from ttcfast.report.policies import best_published, cells, details, explanation, public_returns, run_rows, success, summary
from ttcfast.report.scores import interquartile_mean, scores_of, shares_above, with_interval
from ttcfast.report.verdict import at_equal_time, at_the_end, best_flow, differences, return_after, sentences, times
from ttcfast.runtime.errors import CheckpointError, DataError
from ttcfast.runtime.files import write_json

SWINGUP = "cartpole-swingup"


def evaluation(step: int, value: float, **changes) -> Evaluation:
    own = {"predicted": 50.0, "realised": 23.0, "esnr_db": -4.0, "esnr_unbiased_db": math.nan, "gradient_cosine": 0.99}
    own |= {"gradient_norm": 2.5, "simulator_cosine": 0.8}
    return Evaluation(step=step, returns=(value - 10, value + 10), **{**own, **changes})


def run(arm: str, seed: int, *returns: float, task: str = SWINGUP, esnr: float = -4.0, **changes) -> PolicyResult:
    found = tuple(evaluation(100 * (i + 1), value, esnr_db=esnr + i) for i, value in enumerate(returns))
    errors = ImaginationErrors((0.01, 0.02 + 0.01 * seed), (0.1, 0.2))
    own = {"mode": "offline", "evaluations": found, "errors": errors, "errors_before": errors, "detach": False, "parameters": 1000}
    own |= {"dynamics_gap": 0.002, "dynamics_evaluations": 4, "field_evaluations": 200, "own_episodes": 0, "failed": 0}
    own |= {"wm_seconds": 10.0, "policy_seconds": 20.0, "cpu_seconds": 29.0, "skipped": 1, "stopped": False}
    return PolicyResult(task=task, arm=arm, seed=seed, **{**own, **changes})


@pytest.fixture
def small() -> list[PolicyResult]:
    mlp = [run("mlp", seed, 300, value) for seed, value in enumerate((600, 700, 800))]
    residual = [run("residual", seed, 500, value) for seed, value in enumerate((610, 690, 790))]
    flow = [
        run("heun2", seed, 200, value, esnr=-2.0, policy_seconds=40.0, cpu_seconds=145 / 3) for seed, value in enumerate((650, 760, 840))
    ]
    return [*mlp, *residual, *flow, *(run("euler1", seed, 100, 500) for seed in range(3))]


def test_a_row_is_mean_and_interval_over_seeds(small):
    mlp, _, flow, _ = summary(small)
    assert (mlp["task"], mlp["arm"], mlp["seeds"]) == (SWINGUP, "mlp", 3) and mlp["return"] == pytest.approx(700)
    assert 600 <= mlp["return_low"] < 700 < mlp["return_high"] <= 800
    assert mlp["best_return"] == pytest.approx(700) and mlp["observation_error"] == pytest.approx(0.03)
    assert flow["esnr_db"] == pytest.approx(-1) and flow["esnr_db_median"] == pytest.approx(-1.5) and flow["skipped"] == 3
    assert math.isnan(flow["esnr_unbiased_db"]) and flow["dynamics_evaluations"] == 4 and flow["policy_seconds"] == 40
    assert [row["return"] for row in run_rows(small)[:3]] == [600, 700, 800]
    begun = dataclasses.replace(small[0], evaluations=(evaluation(0, 20, esnr_db=30.0), *small[0].evaluations))
    assert run_rows([begun])[0]["esnr_db_median"] == run_rows(small)[0]["esnr_db_median"], "the initial policy's gradient trains nothing"


def test_the_table_names_detach_and_cost_and_who_has_no_return(small):
    lost = dataclasses.replace(run("mlp", 3), stopped=True, errors=ImaginationErrors((math.nan, math.nan), (0.1, 0.2)))
    text = markdown_table(*cells([*small, lost]), explanation([*small, lost]), text_columns=2)
    more = markdown_table(*details([*small, lost]), [], text_columns=2)
    assert f"| {SWINGUP} | MLP | 3 of 4 | no | 700 [" in text and "| 29 / 30 |" in text
    assert f"| {SWINGUP} | MLP | 700 | -3.0 / -3.5 | – / – | 0.99 / 0.8 | 2.5 | 50.0 / 23.0 | 4 | 200 | 10 / 20 | 4 / 1 |" in more
    assert f"left out of means and intervals: {SWINGUP} mlp seed 3" in text and "dropped" not in text
    assert any("2 episodes were dropped, in which the" in line for line in explanation([dataclasses.replace(lost, failed=2)]))
    row = next(line for line in text.splitlines() if "| MLP |" in line)
    assert "| 0.035 / – |" in row, "an error that is not finite is not averaged away"
    assert all(len(row) == len(heads) for heads, rows in (cells(small), details(small)) for row in rows)


def test_success_is_measured_against_the_best_published_return(small):
    assert best_published(SWINGUP) == (897.0, "PWM") and best_published("gymnasium:Pendulum-v1") is None
    assert max(float(row["return"]) for row in public_returns() if row["task"] == SWINGUP) == 897
    value = 0.9 * 897
    found = [success(run("mlp", 0, 900, value + shift)) for shift in (11, 0, -11)]  # of two episodes, 10 below and 10 above
    assert found == [1, 0.5, 0] and math.isnan(success(run("mlp", 0))) and math.isnan(success(run("mlp", 0, 900, task="mine")))
    rows = [run("mlp", 0, value + 11), run("mlp", 1, value - 11), run("mlp", 0, 1, task="mine")]
    assert [row[5] for row in cells(rows)[1]] == ["50 %", "–"]
    assert (
        "at least 90 % of the best return published for the task (public_returns.csv): cartpole-swingup 807 (PWM 897)"
        in explanation(rows)[1]
    )
    assert "none is known for these tasks" in explanation(rows[2:])[1]


def test_differences_pair_the_seeds(small):
    (found,) = differences(small, "heun2", "mlp", at_the_end)
    assert found.mean == pytest.approx(50) and found.seeds == 3 and 40 <= found.low <= found.high <= 60 and found.met and found.decided
    (control,) = differences(small, "residual", "mlp", at_the_end)
    assert control.mean == pytest.approx(-10 / 3) and not control.met and not control.decided
    (one,) = differences([r for r in small if r.seed == 2 or r.arm == "mlp"], "heun2", "mlp", at_the_end)
    assert one.seeds == 1 and one.mean == 40 and math.isnan(one.low) and not one.decided


def timed(arm: str, *points: tuple[int, float, float], **changes) -> PolicyResult:
    """A run with evaluations of (updates, return, processor seconds), of which each lasts two on the wall."""
    found = tuple(evaluation(step, value, cpu_seconds=s, seconds=2 * s) for step, value, s in points)
    return dataclasses.replace(run(arm, 0), evaluations=found, **changes)


def test_equal_seconds_read_the_slower_curve_where_the_quicker_ended():
    mlp, flow = timed("mlp", (0, 20, 10), (100, 300, 20), (200, 600, 30)), timed("heun2", (0, 40, 20), (100, 200, 36), (200, 700, 60))
    assert [return_after(flow, s) for s in (5, 20, 28, 36, 48, 60, 99)] == pytest.approx([40, 40, 120, 200, 450, 700, 700])
    assert at_equal_time(flow, mlp) == (pytest.approx(40 + 160 * 10 / 16), 600) and at_equal_time(mlp, flow)[0] == 600
    on_gpu = [
        dataclasses.replace(r, device="cuda", evaluations=tuple(dataclasses.replace(e, cpu_seconds=1.0) for e in r.evaluations))
        for r in (mlp, flow)
    ]
    assert times(on_gpu[0]) == [20, 40, 60] and at_equal_time(*on_gpu) == at_equal_time(mlp, flow)
    late = timed("heun2", (0, 40, 50), (100, 900, 90))
    assert at_equal_time(late, mlp) == (40, 600), "its world model is still in training, and its policy the initial one"
    assert "At equal processor seconds" in sentences([mlp, flow])[2] and "At equal wall-clock" in sentences(on_gpu)[2]


def test_seconds_that_were_not_kept_are_spread_over_the_updates():
    mlp, flow = run("mlp", 0, 300, 600, cpu_seconds=15.0), run("heun2", 0, 200, 700, policy_seconds=40.0, cpu_seconds=25.0)
    assert times(flow) == [15, 25], "the first of two evaluations is half-way through the policy's 40 of 50 s, halved on the processor"
    assert return_after(flow, 20) == pytest.approx(450) and math.isnan(return_after(flow, 14.9)) and return_after(flow, 99) == 700
    assert at_equal_time(flow, mlp) == (pytest.approx(200), pytest.approx(600)) and at_equal_time(mlp, flow)[0] == pytest.approx(600)
    assert math.isnan(at_equal_time(run("heun2", 0, 1, 2, wm_seconds=90.0, cpu_seconds=110.0), mlp)[0])
    assert math.isnan(return_after(run("mlp", 0), 10)) and math.isnan(at_equal_time(run("mlp", 0), flow)[1])


def test_the_verdict_is_answered_with_numbers(small):
    assert best_flow(small) == "heun2"
    text = "\n".join(told := sentences(small))
    assert "Best flow arm by these returns: flow, Heun K = 2." in text
    assert (
        f"At equal parameters (dynamics within 0.20 %), flow, Heun K = 2 meets or exceeds the MLP on 1 of 1 tasks: {SWINGUP} +50 [" in text
    )
    assert f"the MLP on 0 of 1 tasks: {SWINGUP} -500 [" in told[2] and "(3 seeds, told apart)" in told[2]
    assert f"on 1 of 1 tasks: {SWINGUP} +2 dB [+2, +2]" in told[3]
    assert "yes at equal parameters, no at equal processor seconds, by the means; intervals exclude 0 on 1 and 1 tasks" in told[4]
    assert "Control: residual MLP meets or exceeds the MLP on 0 of 1 tasks" in told[5] and "Against this control, flow" in told[6]


def test_the_verdict_is_no_where_the_flow_falls_short_on_most_tasks_or_has_no_better_esnr(small):
    pairs = [(task, seed) for task in ("a", "b") for seed in (0, 1)]
    others = [run(arm, seed, 100, value, task=task) for task, seed in pairs for arm, value in (("mlp", 200), ("heun2", 150))]
    assert "on 1 of 3 tasks" in sentences([*small, *others])[1] and "no at equal parameters" in sentences([*small, *others])[4]
    worse = [r if r.arm != "heun2" else run("heun2", r.seed, 200, 900, esnr=-9.0) for r in small]
    assert "no at equal parameters" in sentences(worse)[4]
    assert sentences([r for r in small if r.arm != "mlp"]) == ["No verdict: it takes a flow and the MLP with one random seed on one task."]
    slow = [r if r.arm != "heun2" else dataclasses.replace(r, wm_seconds=99.0) for r in small]
    assert "open at equal processor seconds" in sentences(slow)[4] and "cannot be compared: the quicker run ended" in sentences(slow)[2]


def test_scores_are_resampled_within_tasks():
    assert interquartile_mean(np.array([0.0, 1, 2, 3, 4, 5, 6, 100])) == 3.5 and interquartile_mean(np.array([0.0, 1, 5])) == 2
    middle, low, high = with_interval({"a": [0.1] * 4, "b": [0.9] * 4}, interquartile_mean)
    assert (middle, low, high) == (pytest.approx(0.5),) * 3, "each task's runs are alike, so that nothing varies"
    middle, low, high = with_interval({"a": [0.1, 0.2, 0.6, 0.7]}, shares_above)
    assert middle[50] == 0.5 and low[50] == 0 and high[50] == 1 and middle[0] == low[0] == 1 and middle[65] == 0.25


def test_scores_are_of_the_tasks_that_all_arms_have_finished(small):
    more = [*small, run("mlp", 0, 100, task="walker-walk"), run("mlp", 0, -900, task="gymnasium:Pendulum-v1")]
    assert scores_of(more)["mlp"] == {SWINGUP: [0.6, 0.7, 0.8]} and set(scores_of(more)) == {"mlp", "residual", "heun2", "euler1"}
    assert scores_of([run("mlp", 0, 1, task="a"), run("heun2", 0, 1, task="b")]) == {} and scores_of([]) == {}


def test_learning_curves_stand_beside_public_returns(small):
    figure = learning_curves([*small, run("mlp", 0, 1, 2, task="unknown-task")])
    left, right = figure.axes
    drawn = {tuple(line.get_ydata()) for line in left.get_lines()}
    assert (300.0, 700.0) in drawn and (897.0,) in drawn and (876.0,) in drawn and len(right.get_lines()) == 1
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["MLP", "residual MLP", "flow, Heun K = 2", "flow, Euler K = 1", "TD-MPC2", "DreamerV3", "SAC", "TD-MPC", "PWM"]
    assert all(0 <= float(row["return"]) <= 1000 and row["source"] for row in public_returns()) and len(public_returns()) == 73


def test_the_profile_falls_from_all_to_none(small):
    left, right = performance_profile(small).axes
    curve = right.get_lines()[0].get_ydata()
    assert curve[0] == 1 and curve[-1] == 0 and all(np.diff(curve) <= 0)
    assert left.get_lines()[1].get_xdata()[0] == pytest.approx(0.7)


def test_every_figure_is_drawn_and_a_run_without_a_policy_has_those_it_can(small):
    names = ["learning_curves", "esnr", "gradient_cosine", "values", "endpoint_error", "performance_profile"]
    assert [name for name, _ in policy_figures(small)] == names
    assert all(b"</svg>" in svg_of(draw()) for _, draw in policy_figures([*small, run("mlp", 3)]))
    assert [name for name, _ in policy_figures([run("mlp", 0)])] == ["endpoint_error"]


def store(folder, results) -> None:
    for found in results:
        path = folder / found.task / f"{found.arm}_seed{found.seed}" / "result.json"
        write_json(path, {"result": dataclasses.asdict(found), "settings": {}})


def page_of(tmp_path, *folders) -> str:
    assert compare(CompareConfig(tuple(map(str, folders)), str(tmp_path / "page"))) == []
    return (tmp_path / "page" / "report.html").read_text(encoding="utf-8")


def test_the_page_shows_what_is_finished_of_a_protocol(small, tmp_path):
    out = tmp_path / "out"
    write_json(out / "protocol.provenance.json", {"config": {"steps": 2}})
    with pytest.raises(DataError, match="has no numbers yet"):
        page_of(tmp_path, out)
    store(out, small[:2])
    text = page_of(tmp_path, out)
    assert "Policies of 2 finished runs" in text and "Verdict" not in text and text.count("<figure") == 6
    store(out, small)
    text = page_of(tmp_path, out)
    assert "Policies of 12 finished runs" in text and "Acceptance of the plan" in text and "yes at equal parameters" in text


def test_the_page_gathers_a_sweep_over_arms(small, tmp_path):
    for arm in ("mlp", "heun2"):
        store(tmp_path / "sweep" / f"arms-_{arm}_", [r for r in small if r.arm == arm])
        write_json(tmp_path / "sweep" / f"arms-_{arm}_" / "protocol.provenance.json", {"config": {}})
    text = page_of(tmp_path, tmp_path / "sweep")
    assert "Policies side by side" in text and "Policies of 6 finished runs" in text and "Acceptance of the plan" in text
    assert [r.arm for r in gathered([small[6:9], small[:3]])] == ["mlp"] * 3 + ["heun2"] * 3
    assert gathered([small, small[:1]]) == [], "runs that differ in something else are no one protocol"


def test_results_of_other_kinds_are_no_policies_and_damaged_ones_are_told(small, tmp_path):
    store(tmp_path / "out", small[:1])
    write_json(tmp_path / "out" / "world" / "mlp_seed0" / "result.json", {"result": {"arm": "mlp", "evaluations": 4}, "settings": {}})
    write_json(tmp_path / "out" / "protocol.provenance.json", {"config": {}})
    assert "Policies of 1 finished run<" in page_of(tmp_path, tmp_path / "out")
    path = tmp_path / "out" / SWINGUP / "mlp_seed0" / "result.json"
    held = json.loads(path.read_text())
    del held["result"]["detach"]
    write_json(path, held)
    with pytest.raises(CheckpointError, match=r"mlp_seed0/result\.json is damaged"):
        page_of(tmp_path, tmp_path / "out")
