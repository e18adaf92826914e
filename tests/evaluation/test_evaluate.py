import dataclasses
import math

import pytest
import torch
from torch import nn

from tests.small_run import SCALE, SPEC, arm, problems, small_evaluation, surrogate, trajectories
from tests.surrogates import drop_surrogate, euler_state
from ttcfast.core.base_fm import Surrogate
from ttcfast.core.normalizer import Normalizer
from ttcfast.evaluation.calibration import candidate_scores
from ttcfast.evaluation.evaluate import Problems, evaluate, evaluate_method
from ttcfast.evaluation.frontier import trace_frontier
from ttcfast.evaluation.methods import variants
from ttcfast.evaluation.results import Gain, MethodResult
from ttcfast.evaluation.sweep import runs_needed, sweep_branching
from ttcfast.metrics import conservation_drift, sample_gain
from ttcfast.rewards.arm import ARMScorer
from ttcfast.rewards.prm.dense import DensePRM
from ttcfast.rewards.prm.scorer import PRMScorer
from ttcfast.rewards.scorer import ScoreContext
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.projection import project_conservation

METHODS = ["deterministic", "random", "mean", "arm", "oracle"]


@pytest.fixture(scope="module")
def evaluation():
    return small_evaluation()


def test_every_method_stands_without_and_with_projection(evaluation):
    assert [(r.method, r.projected) for r in evaluation.results] == [
        ("persistence", False),
        *((m, p) for m in METHODS for p in (False, True)),
    ]
    for result in evaluation.results:
        assert result.mse.shape == (5, 9) and result.mse.dtype == torch.float64
        assert all(v.shape == (5, 9) for v in result.drift.values())
        assert not result.blown_up.any()


def test_costly_uses_of_a_reward_may_stand_with_projection_alone():
    used = {form: variants({"arm": arm()}, TTCConfig(beam_width=2, approach="beam"), search_projected=form) for form in (False, True)}
    alone = {form: {name for name, variant in held.items() if variant.projected_alone} for form, held in used.items()}
    assert alone == {False: set(), True: {"arm", "arm_refined", "arm_beam"}}


def test_persistence_is_the_first_frame_at_every_step(evaluation):
    truth = trajectories()
    still, error = evaluation.results[0], ((truth[:, :1] - truth).double() / SCALE.double()[:, None, None]).square().mean((2, 3, 4))
    torch.testing.assert_close(still.mse, error, rtol=1e-6, atol=1e-12)
    assert torch.equal(evaluation.persistence, still.mse) and still.name == "persistence" and evaluation.rollouts[0] is evaluation.baseline
    assert still.final_drift("mass") == 0 and (still.seconds, still.evaluations) == (0, 0)


def test_further_rows_stand_where_they_are_put(evaluation):
    extra = dataclasses.replace(evaluation.baseline, method="solver 16x16")
    assert [r.method for r in evaluation.adding(extra, after="deterministic").results[:5]] == [
        *("persistence", "deterministic", "deterministic", "solver 16x16", "random")
    ]
    assert evaluation.adding(extra).results[-1] is evaluation.adding(extra, after="nothing").results[-1] is extra


@pytest.mark.parametrize("moves", [1, 2])
@pytest.mark.parametrize("projected", [False, True])
def test_corrector_alone_is_the_deterministic_step_and_the_moves_of_the_reward(moves, projected):
    torch.manual_seed(1)
    network = DensePRM(8, width=8, levels=2, normalizer=Normalizer(torch.tensor([1.0, 0.2, -0.1, 2.5]), SCALE, 0.1 * SCALE))
    torch.nn.init.normal_(network.out.weight, std=0.05)
    prm, fm, given = PRMScorer(network, spec=SPEC), surrogate(), problems(3, 3, shown=(0, 1, 2))
    config = TTCConfig(branching_factor=4, refine_steps=moves, refine_lengths=(0.5, 1.0), trust=None, select="span")
    found = evaluate_method("prm_corrector", fm, given, variants({"prm": prm}, config)["prm_corrector"], config, projected=projected)
    x = given.truth[:, 0]
    for step in range(3):
        y = fm.deterministic(x)
        for _ in range(moves):
            seen = project_conservation(x, y, SPEC)[0] if projected else y
            y = y + prm.ascent(x, seen.unsqueeze(1), ScoreContext(step, torch.arange(3)))[:, 0]
        x = project_conservation(x, y, SPEC)[0] if projected else y
        torch.testing.assert_close(found.trajectory[:, step + 1], x, rtol=1e-5, atol=1e-6)
    assert (found.evaluations, found.reward_evaluations, found.branching_factor) == (9, 9 * moves, 1)
    assert found.mse[:, 1].ne(evaluate_method("deterministic", fm, given, None, config, projected=projected).mse[:, 1]).all()


def test_errors_are_those_of_the_trajectory(evaluation):
    truth = trajectories()
    for result in evaluation.results:
        error = ((result.trajectory - truth[[0, 2]]).double() / SCALE.double()[:, None, None]).square().mean((2, 3, 4))
        torch.testing.assert_close(result.mse[[0, 2]], error, rtol=1e-6, atol=1e-12)
        drift = conservation_drift(result.trajectory, SPEC)
        torch.testing.assert_close(result.drift["energy"][[0, 2]], drift["energy"])


def test_deterministic_rollout_is_the_surrogate_applied_again_and_again(evaluation):
    fm, x = surrogate(), trajectories()[:, 0]
    for _ in range(8):
        x = fm.deterministic(x)
    torch.testing.assert_close(evaluation.baseline.trajectory[:, -1], x[[0, 2]])


def test_cost_is_counted_in_model_evaluations(evaluation):
    cost = {r.method: r.evaluations for r in evaluation.results}
    assert cost == {"persistence": 0, "deterministic": 40, "random": 40, "mean": 160, "arm": 160, "oracle": 160}


def test_gain_is_stated_against_both_references(evaluation):
    for result in evaluation.results:
        for reference, gain in (
            (evaluation.baseline, evaluation.gain(result)),
            (evaluation.projected_baseline, evaluation.gain_over_projected(result)),
        ):
            expected = sample_gain(reference.mse[:, 1:].mean(1), result.mse[:, 1:].mean(1))
            torch.testing.assert_close(gain.per_problem, expected)
            assert gain.mean == pytest.approx(float(expected.mean()))
            assert gain.median == pytest.approx(float(expected.sort().values[2]))
            assert gain.improved == pytest.approx(100 * float((expected > 0).double().mean()))


def test_projection_keeps_the_totals_and_takes_out_the_bias(evaluation):
    for method in METHODS:
        raw, projected = evaluation.find(method), evaluation.find(method, projected=True)
        assert projected.final_drift("mass") < 1e-5 < raw.final_drift("mass")
        assert float(projected.rollout_error.mean()) < float(raw.rollout_error.mean())


def test_oracle_is_no_worse_than_others_at_the_first_step(evaluation):
    """Greedy on truth, so the ceiling holds for the first step from the same state: in both forms."""
    for projected in (False, True):
        best = evaluation.find("oracle", projected=projected).mse[:, 1]
        for method in ("deterministic", "arm"):
            assert bool((best <= evaluation.find(method, projected=projected).mse[:, 1] * (1 + 1e-6)).all())


def test_rollout_beyond_the_truth_goes_on_and_errors_stop():
    evaluation = small_evaluation(n=2, steps=4, rolled=7)
    assert (evaluation.steps, evaluation.scored) == (7, 4)
    assert any("truth ends at step 4" in note for note in evaluation.notes)
    for result in evaluation.results:
        assert result.steps == 4 and math.isnan(result.mse_at(5))
        assert result.drift["mass"].shape[1] == (5 if result.method == "oracle" else 8)
    short = small_evaluation(n=2, steps=4)
    torch.testing.assert_close(evaluation.baseline.mse, short.baseline.mse)


def test_open_domain_leaves_projection_out_and_says_so():
    fm, given = surrogate(), problems(2, 3)
    fm.spec = SPEC.replace(periodic=False)
    given = dataclasses.replace(given, spec=fm.spec, shown=())
    evaluation = evaluate(fm, given, {"arm": arm()}, TTCConfig(branching_factor=2))
    assert not any(r.projected for r in evaluation.results) and "domain is open" in evaluation.notes[0]
    with pytest.raises(ValueError, match="open"):
        evaluate(fm, given, {}, TTCConfig(branching_factor=2), projection=True)


def test_a_method_that_blows_up_is_no_gain():
    with pytest.warns(RuntimeWarning, match="NaN from here on"):
        evaluation = small_evaluation(n=3, steps=20, bias=0.25, blows_up=True)
    raw, projected = evaluation.baseline, evaluation.projected_baseline
    assert raw.blown_up.all() and not projected.blown_up.any()
    gain = evaluation.gain(projected)
    assert gain.per_problem.tolist() == [100.0] * 3 and gain.improved == 100.0
    worse = evaluation.gain_over_projected(raw)
    assert worse.mean == -math.inf and worse.improved == 0.0
    assert math.isnan(evaluation.gain(raw).median) and evaluation.gain(raw).improved == 0.0


def result_of(mse: list[list[float]], **options) -> MethodResult:
    return MethodResult("arm", False, 4, torch.tensor(mse, dtype=torch.float64), {}, 1.0, 8, **options)


def test_gain_median_of_an_even_number_is_the_middle_of_two():
    reference = result_of([[0.0, 1.0]] * 4)
    gain = Gain.of(result_of([[0.0, 0.5], [0.0, 0.9], [0.0, 2.0], [0.0, math.nan]]), reference)
    assert gain.per_problem[3] == -math.inf
    assert gain.median == pytest.approx((10.0 - 100.0) / 2, rel=1e-6)
    assert gain.improved == 50.0


def test_first_problems_carry_their_share_of_the_cost():
    half = result_of([[0.0, 1.0], [0.0, 3.0]], fallbacks=4).first(1)
    assert (half.seconds, half.evaluations, half.fallbacks, float(half.rollout_error)) == (0.5, 4, 2, 1.0)


def test_sweep_reuses_what_the_table_has(evaluation):
    ran = []
    config = TTCConfig(branching_factor=4, seed=1)
    fm = surrogate()
    sweep = sweep_branching(fm, problems(), {"arm": arm()}, config, (1, 2, 6), evaluation, count=3, report=ran.append)
    assert [(r.method, r.branching_factor) for r in ran] == [(m, b) for m in ("mean", "arm", "oracle") for b in (2, 6)]
    assert sorted(r.branching_factor for r in ran) == sorted(runs_needed({"arm": arm()}, (1, 2, 6), config, fm))
    assert sweep.branching_factors == (1, 2, 4, 6) and all(r.mse.shape == (3, 9) for r in sweep.results)
    mean_line, arm_line = sweep.lines()[:2]
    torch.testing.assert_close(mean_line[0].mse, evaluation.baseline.mse[:3])
    torch.testing.assert_close(mean_line[2].mse, evaluation.find("mean").mse[:3])
    torch.testing.assert_close(arm_line[0].mse, evaluation.baseline.mse[:3])
    torch.testing.assert_close(arm_line[2].mse, evaluation.find("arm").mse[:3])
    few = evaluate_method("arm", fm, problems().first(3), arm(), dataclasses.replace(config, branching_factor=6))
    torch.testing.assert_close(arm_line[3].mse, few.mse)


def test_sweep_without_a_deterministic_candidate_runs_b_one():
    given, fm = problems(2, 3), surrogate()
    config = TTCConfig(branching_factor=2, include_deterministic=False)
    table = evaluate(fm, given, {"arm": arm()}, config, oracle=False)
    ran = []
    sweep_branching(fm, given, {"arm": arm()}, config, (1,), table, count=2, mean=False, oracle=False, report=ran.append)
    assert [r.branching_factor for r in ran] == [1]


def test_refined_candidates_are_swept_from_b_one_on():
    given, fm, config = problems(2, 2), surrogate(), TTCConfig(branching_factor=2)
    used = {name: v for name, v in variants({"arm": arm()}, config).items() if name in ("arm", "arm_refined")}
    table = evaluate(fm, given, used, config, oracle=False, projection=False)
    ran = []
    sweep_branching(fm, given, used, config, (1, 2), table, count=2, mean=False, oracle=False, report=ran.append)
    assert [(r.method, r.branching_factor) for r in ran] == [("arm_refined", 1)]
    assert runs_needed(used, (1, 2), config, fm, mean=False, oracle=False) == [1]


def test_chosen_rows_alone_are_run_and_known_ones_are_not_run_again(evaluation):
    ran, config = [], TTCConfig(branching_factor=4, seed=1)
    known = [r for r in evaluation.results if r.method in ("deterministic", "arm")]
    used = variants({"arm": arm()}, config)
    table = evaluate(surrogate(), problems(), used, config, methods=["arm_span", "arm"], known=known, report=ran.append)
    assert [(r.method, r.projected) for r in ran] == [("arm_span", False), ("arm_span", True)]
    assert [(r.method, r.projected) for r in table.rollouts] == [
        (m, p) for m in ("deterministic", "arm", "arm_span") for p in (False, True)
    ]
    assert table.find("arm") is evaluation.find("arm")
    with pytest.raises(ValueError, match=r"methods names arm_best; here there are deterministic, .*arm_span.*span_oracle"):
        evaluate(surrogate(), problems(), used, config, methods=["arm_best"])


def test_ceilings_hold_for_the_first_step_of_every_use_of_a_reward():
    config, given = TTCConfig(branching_factor=4, seed=1), problems(4, 1)
    used = {n: v for n, v in variants({"arm": arm()}, config).items() if n != "arm_refined_oracle"}
    table = evaluate(surrogate(), given, used, config, methods=["arm_softmax", "arm_span", "oracle", "span_oracle", "arm"])
    moved = evaluate(surrogate(), given, variants({"arm": arm()}, config), config, methods=["arm_refined", "arm_refined_oracle"])
    for projected in (False, True):
        least = table.find("span_oracle", projected=projected).mse[:, 1] * (1 - 1e-4)
        for name in ("arm_softmax", "arm_span", "oracle", "arm", "deterministic"):
            assert bool((least <= table.find(name, projected=projected).mse[:, 1]).all())
        ceiling = moved.find("arm_refined_oracle", projected=projected).mse[:, 1]
        assert bool((ceiling <= moved.find("arm_refined", projected=projected).mse[:, 1] * (1 + 1e-6)).all())
        assert bool((ceiling <= table.find("oracle", projected=projected).mse[:, 1] * (1 + 1e-6)).all())
    assert moved.find("arm_refined").evaluations == 16 and moved.find("arm_refined").reward_evaluations == 16 * (3 + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truth": trajectories()[0]}, r"expected \[N, K\+1, C, \*S\]"),
        ({"truth": trajectories()[:, :1]}, "2 frames"),
        ({"steps": 0}, "steps is 0"),
        ({"shown": (5,)}, "problems 0 to 4"),
        ({"before": trajectories(4)[:, :1]}, r"before has shape \(4, 1, 4, 16, 16\); expected \[5, h-1, 4, 16, 16\]"),
    ],
)
def test_problems_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(problems(), **changes)


def test_method_without_a_scorer_is_refused():
    with pytest.raises(ValueError, match="without a scorer"):
        evaluate_method("prm", surrogate(), problems(), None, TTCConfig())


def test_problems_first_cuts_gamma_too():
    spec = SPEC.replace(gamma=torch.full((5,), 1.3))
    assert Problems(trajectories(), spec, 3).first(2).spec.gamma.shape == (2,)


def test_a_surrogate_with_history_starts_from_the_frames_before():
    frames, fm = euler_state(12).reshape(2, 6, 4, 8, 8), drop_surrogate(history=3)
    given = Problems(frames[:, 2:], fm.spec, 2, before=frames[:, :2])
    for step in range(4):
        assert torch.equal(given.window(step, 3), frames[:, step : step + 3]) and torch.equal(given.window(step, 1), frames[:, step + 2])
    assert torch.equal(given.first(1).window(0, 3), frames[:1, :3])
    rolled = evaluate_method("deterministic", fm, given, None, TTCConfig()).trajectory
    second = fm.deterministic(torch.cat([frames[:1, 1:3], rolled[:, 1:2]], 1), step=1)
    assert torch.equal(rolled[:, 0], frames[:1, 2])
    torch.testing.assert_close(rolled[:, 2], second)
    with pytest.raises(ValueError, match=r"1 frames up to step 0 and the surrogate sees 3; give Problems\(before=...\) of 2 frames"):
        evaluate_method("deterministic", fm, Problems(frames, fm.spec, 2), None, TTCConfig())


@pytest.mark.parametrize("shard", ["problems", "candidates"])
def test_every_choice_by_a_reward_is_divided_among_processes(shard, monkeypatch):
    """Rows with the best candidate go through the search that can be divided, bit for bit as the greedy one; the others do not."""
    given, config = problems(2, 2), TTCConfig(branching_factor=3, seed=1, beam_width=2, approach="beam")
    wanted = ("random", "mean", "arm", "arm_refined", "arm_refined_oracle", "arm_softmax", "arm_span", "arm_beam", "oracle", "span_oracle")
    alone = evaluate(surrogate(), given, variants({"arm": arm()}, config), config, methods=wanted)
    divided, rollout = [], TTCBeam.rollout
    monkeypatch.setattr(TTCBeam, "rollout", lambda self, *a, **k: divided.append(self.cfg.shard) or rollout(self, *a, **k))
    config = dataclasses.replace(config, shard=shard)
    together = evaluate(surrogate(), given, variants({"arm": arm()}, config), config, methods=wanted)
    assert divided == [shard] * 2 * 5  # arm, refined, refined oracle, beam, oracle, with and without projection
    for ours, theirs in zip(together.results, alone.results, strict=True):
        assert torch.equal(ours.trajectory, theirs.trajectory) and torch.equal(ours.mse, theirs.mse), ours.name
        assert (ours.evaluations, ours.reward_evaluations) == (theirs.evaluations, theirs.reward_evaluations), ours.name
    frontier = trace_frontier(surrogate(), given, {"arm": arm()}, config, (4,), oracle=False)
    assert set(divided[10:]) == {shard, "problems"} and len(divided[10:]) == len(frontier.results) == 5


def test_results_print_in_one_line():
    found = small_evaluation(2, 2)
    shown = [repr(found), repr(found.baseline), repr(found.gain(found.results[-1]))]
    assert all("\n" not in text and "tensor" not in text for text in shown)
    assert shown[0].startswith("Evaluation(2 problems, 2 steps: persistence, deterministic, ")


def test_errors_are_those_of_the_channels_that_are_predicted():
    spec = StateSpec.fields("u", "mask", "v", given="mask")
    truth = torch.randn(2, 4, 3, 5, 5)
    truth[:, :, 1] = truth[:, :1, 1]
    scale, other = torch.tensor([1.0, 7.0, 2.0]), truth + torch.tensor([0.5, 0.0, 1.0]).reshape(3, 1, 1)
    given = Problems(truth, spec, 3, scale)
    torch.testing.assert_close(given.error(other[:, :3]), torch.full((2, 3), 0.25, dtype=torch.float64), rtol=1e-5, atol=0)


def test_the_errors_of_candidates_are_those_of_the_channels_that_are_predicted():
    torch.manual_seed(0)
    spec = StateSpec.fields("u", "mask", "v", given="mask", conserved="u")
    fm = Surrogate(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.3)), spec)
    given = Problems(torch.randn(2, 3, 3, 5, 5), spec, 2)  # whose mask changes, which no candidate foresees
    found = candidate_scores(fm, given, {"arm": ARMScorer(spec=spec)}, TTCConfig(branching_factor=3), groups=4)
    for row, problem, step in zip(found.errors, found.problems, found.steps):
        x, where = given.truth[problem : problem + 1, step], torch.tensor([problem])
        drawn = fm.candidates(x, torch.tensor([1, 2]), problem_ids=where, seed=0, step=step)
        made = torch.cat([fm.deterministic(x, step=step).unsqueeze(1), drawn], 1)[0]
        wrong = (made - given.truth[problem, step + 1])[:, [0, 2]].square().mean((1, 2, 3))
        torch.testing.assert_close(row.float(), wrong)
