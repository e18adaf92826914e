import re
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.scorers import last_cell
from tests.surrogates import DropNet, Foreign, Shift, drop_surrogate, euler_state, shift_surrogate, shifted
from ttcfast.core.base_fm import BaseFM, Surrogate
from ttcfast.rewards.common import ARMScorer, OracleScorer, Scorer, ScorerList
from ttcfast.spec import ARMWeights, StateSpec, StochasticConfig, TTCConfig
from ttcfast.stochastic_sampling import DeterministicModelError
from ttcfast.ttc.inference import TTCGreedy

ARM = ARMScorer(ARMWeights(), 1.0, scale="relative", momentum="components")


def test_the_oracle_finds_the_exact_solution():
    x0 = euler_state()
    truth = shifted(x0, 5)
    result = TTCGreedy(shift_surrogate(0.05), OracleScorer(truth), TTCConfig(branching_factor=4)).rollout(x0, 5, return_info=True)
    assert torch.equal(result.trajectory, truth)
    assert bool((result.chosen == 0).all()) and bool((result.scores[:, :, 0] == 0).all())
    assert bool((result.scores[:, :, 1:] < 0).all())


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_shapes_dtypes_and_counts(n, b, steps, include):
    cfg = TTCConfig(branching_factor=b, include_deterministic=include)
    x0 = euler_state(n)
    r = TTCGreedy(drop_surrogate(), ARM, cfg).rollout(x0, steps, return_info=True)
    assert r.trajectory.shape == (n, steps + 1, 4, 8, 8) and r.trajectory.dtype == torch.float32
    assert torch.equal(r.trajectory[:, 0], x0)
    assert r.scores.shape == (n, steps, b) and r.chosen.shape == (n, steps) and r.chosen.dtype == torch.int64
    for name in ("fallbacks", "collapsed", "unprojected", "frozen"):
        assert getattr(r, name).shape == (n, steps) and getattr(r, name).dtype == torch.bool
    assert r.nfe == n * b * steps and r.seconds > 0
    assert set(r.interventions().values()) == {0}
    assert torch.equal(r.chosen, r.scores.argmax(2))


def test_one_problem_alone_has_the_sketchs_shape():
    x0 = euler_state(1)
    controller = TTCGreedy(drop_surrogate(), ARM, TTCConfig(branching_factor=3))
    single, batch = controller.rollout(x0[0], 4), controller.rollout(x0, 4)
    assert single.shape == (4, 5, 8, 8) and single.is_contiguous()
    assert torch.equal(single.transpose(0, 1), batch[0])


def test_every_step_is_the_best_candidate_of_its_state():
    fm, x0, cfg = drop_surrogate(), euler_state(), TTCConfig(branching_factor=5, seed=3)
    r = TTCGreedy(fm, last_cell, cfg).rollout(x0, 3, return_info=True)
    for t in range(3):
        x = r.trajectory[:, t]
        drawn = fm.candidates(x, torch.arange(1, 5), problem_ids=torch.arange(3), seed=3, step=t)
        group = torch.cat([fm.deterministic(x).unsqueeze(1), drawn], 1)
        torch.testing.assert_close(r.scores[:, t], group[:, :, 0, -1, -1].double())
        best = group[torch.arange(3), group[:, :, 0, -1, -1].argmax(1)]
        assert torch.equal(r.trajectory[:, t + 1], best)


def test_seeds_decide_and_nothing_else_does():
    x0, fm = euler_state(), drop_surrogate()

    def roll(**changes):
        return TTCGreedy(fm, last_cell, TTCConfig(branching_factor=4, **changes)).rollout(x0, 3)

    state = torch.random.get_rng_state()
    first = roll()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(roll(), first)
    assert not torch.equal(roll(seed=1), first)


@pytest.mark.parametrize("noise", [{}, {"latent_sigma": 0.1, "input_eps": 0.01, "antithetic": True}])
def test_neither_chunks_nor_company_change_a_choice(noise):
    x0, fm = euler_state(), drop_surrogate(stochastic=noise)

    def roll(x, ids=None, **changes):
        cfg = TTCConfig(branching_factor=12, seed=2, **changes)
        return TTCGreedy(fm, last_cell, cfg).rollout(x, 4, return_info=True, problem_ids=ids)

    whole = roll(x0)
    assert len(whole.chosen.unique()) > 2
    for other, rows in (
        *((roll(x0, chunk_size=size), slice(None)) for size in (1, 5, 12)),
        (roll(x0.flip(0), torch.arange(3).flip(0)), [2, 1, 0]),
        (roll(x0[1:2], torch.tensor([1])), [1]),
    ):
        assert torch.equal(other.chosen, whole.chosen[rows])
        torch.testing.assert_close(other.trajectory, whole.trajectory[rows])


def test_steps_can_be_taken_one_by_one():
    x0, controller = euler_state(), TTCGreedy(drop_surrogate(), ARM, TTCConfig(branching_factor=3))
    whole = controller.rollout(x0, 4, return_info=True)
    steps = list(controller.rollout_iter(x0, 4))
    assert [s.step for s in steps] == [0, 1, 2, 3]
    for t, s in enumerate(steps):
        assert torch.equal(s.state, whole.trajectory[:, t + 1]) and torch.equal(s.scores, whole.scores[:, t])
    assert sum(s.nfe for s in steps) == whole.nfe
    assert next(controller.rollout_iter(x0[0], 1)).state.shape == (4, 8, 8)


def test_no_gradient_is_kept_and_the_mode_of_the_caller_is():
    controller = TTCGreedy(drop_surrogate(), ARM, TTCConfig(branching_factor=2))
    for s in controller.rollout_iter(euler_state().requires_grad_(), 2):
        assert torch.is_grad_enabled() and not s.state.requires_grad
    assert not controller.rollout(euler_state().requires_grad_(), 1).requires_grad


def test_the_config_overrides_the_surrogates_noise():
    x0 = euler_state()
    loud = TTCConfig(branching_factor=3, stochastic={"dropout": False, "input_eps": 0.5}, include_deterministic=False)
    a = TTCGreedy(drop_surrogate(), last_cell, loud).rollout(x0, 1)
    b = TTCGreedy(drop_surrogate(stochastic=StochasticConfig(dropout=False, input_eps=0.5)), last_cell, loud).rollout(x0, 1)
    assert torch.equal(a, b)


def test_the_search_sees_the_history():
    fm = drop_surrogate(history=2)
    window = torch.stack([euler_state(seed=0), euler_state(seed=1)], 1)
    r = TTCGreedy(fm, ARM, TTCConfig(branching_factor=1)).rollout(window, 3)
    assert torch.equal(r[:, 0], window[:, 1])
    expected = fm.deterministic(torch.stack([r[:, 1], r[:, 2]], 1))
    assert torch.equal(r[:, 3], expected)
    assert TTCGreedy(fm, ARM, TTCConfig(branching_factor=3)).rollout(window[0], 2).shape == (4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"expected floating point \[h, C, S, S\] or \[N, h, C, S, S\]"):
        TTCGreedy(fm, ARM).rollout(window[0, 0], 2)


class CountingScorer(Scorer):
    """Scores like ``last_cell`` and notes how many candidates it saw at once."""

    def __init__(self, needs_group: bool = False) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.needs_group = needs_group

    def score_group(self, state, candidates, context):
        assert context.problem_ids.shape == state.shape[:1]
        self.seen.append(candidates.shape[0] * candidates.shape[1])
        return candidates[:, :, 0, -1, -1]


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("include", [True, False])
def test_no_chunk_is_larger_than_asked_for_and_the_best_of_all_wins(most, include):
    n, b = 3, 5
    fm, scorer = drop_surrogate(), CountingScorer()
    cfg = TTCConfig(branching_factor=b, include_deterministic=include, chunk_size=most)
    fm.model.calls.clear()
    r = TTCGreedy(fm, scorer, cfg).rollout(euler_state(n), 2, return_info=True)
    assert max(scorer.seen) <= most and max(fm.model.calls) <= most
    assert sum(scorer.seen) == r.nfe == n * b * 2 and sum(fm.model.calls) >= r.nfe  # chunks are filled up
    assert torch.equal(r.chosen, r.scores.argmax(2))
    picked = r.scores.gather(2, r.chosen.unsqueeze(2))[:, :, 0]
    torch.testing.assert_close(r.trajectory[:, 1:, 0, -1, -1].double(), picked)


def test_one_chunk_is_freed_before_the_next_is_made():
    class Watched(Foreign):
        last: weakref.ref | None = None
        alive = 0

        def sample_next(self, x_t, seed=None, multi=False):
            if self.last is not None and self.last() is not None:
                self.alive += 1
            out = super().sample_next(x_t, seed, multi)
            self.last = weakref.ref(out.untyped_storage())
            return out

    fm = Watched()
    TTCGreedy(fm, last_cell, TTCConfig(branching_factor=6, chunk_size=3)).rollout(euler_state(), 2)
    assert fm.calls == 12 and fm.alive == 0


def test_a_scorer_that_compares_gets_whole_groups():
    scorer = CountingScorer(needs_group=True)
    r = TTCGreedy(drop_surrogate(), scorer, TTCConfig(branching_factor=4, chunk_size=9)).rollout(euler_state(5), 1, return_info=True)
    assert scorer.seen == [8, 8, 4] and r.nfe == 20
    z = ScorerList([ARM, last_cell], zscore=True)
    with pytest.raises(ValueError, match="a chunk holds 3 candidates but the scorer needs a step's 4 together"):
        TTCGreedy(drop_surrogate(), z, TTCConfig(branching_factor=4, chunk_size=3)).rollout(euler_state(), 1)
    assert TTCGreedy(drop_surrogate(), z, TTCConfig(branching_factor=4)).rollout(euler_state(), 2).isfinite().all()


def test_a_foreign_model_needs_only_sample_next():
    x0, fm = euler_state(), Foreign(0.01)
    truth = shifted(x0, 4)
    r = TTCGreedy(fm, OracleScorer(truth), TTCConfig(branching_factor=8)).rollout(x0, 4, return_info=True)
    assert fm.batches == [24] * 4 and r.nfe == 96
    one = TTCGreedy(Foreign(0.01), OracleScorer(truth), TTCConfig(branching_factor=1)).rollout(x0, 4)
    assert (r.trajectory[:, 1] - truth[:, 1]).square().mean() < (one[:, 1] - truth[:, 1]).square().mean()
    again = TTCGreedy(Foreign(0.01), OracleScorer(truth), TTCConfig(branching_factor=8)).rollout(x0, 4)
    assert torch.equal(r.trajectory, again)  # it ignores the seed it is given; the seed context holds it all the same


def test_a_subclass_of_base_fm_is_foreign_too():
    class Noisy(BaseFM):
        def forward(self, x_t):
            return x_t + 0.01 * torch.randn_like(x_t)

    out = TTCGreedy(Noisy(), lambda x, c: -(c - x).square().flatten(1).mean(1), TTCConfig(branching_factor=3)).rollout(euler_state()[0], 2)
    assert out.shape == (4, 3, 8, 8)


def test_a_foreign_model_in_one_dimension():
    cfg = TTCConfig(branching_factor=3, ndim=1)
    assert TTCGreedy(Foreign(), lambda x, c: c[:, 0, 0], cfg).rollout(torch.rand(2, 3, 16), 2).shape == (2, 3, 3, 16)


def test_noise_drawn_once_per_call_works_one_candidate_at_a_time():
    class PerCall(Foreign):
        def sample_next(self, x_t, seed=None, multi=False):
            return x_t + 0.01 * torch.randn(())

    with pytest.raises(DeterministicModelError, match="chunk_size=1 for a model that draws its noise once per call"):
        TTCGreedy(PerCall(), last_cell, TTCConfig(branching_factor=4)).rollout(euler_state(1), 1)
    assert TTCGreedy(PerCall(), last_cell, TTCConfig(branching_factor=4, chunk_size=1)).rollout(euler_state(1), 2).isfinite().all()


@pytest.mark.parametrize("b", [2, 5])
@pytest.mark.parametrize("chunk", [None, 1])
def test_a_model_that_stays_deterministic_raises(b, chunk):
    cfg = TTCConfig(branching_factor=b, chunk_size=chunk)
    quiet = Surrogate(DropNet(p=0.0), StateSpec.euler2d())
    for fm in (Surrogate(Shift(), StateSpec.euler2d()), quiet, Foreign(0.0)):
        with pytest.raises(DeterministicModelError, match="stays deterministic"):
            TTCGreedy(fm, ARM, cfg).rollout(euler_state(), 3)
        if fm is quiet:
            assert TTCGreedy(fm, ARM, TTCConfig(branching_factor=1)).rollout(euler_state(), 2).shape == (3, 3, 4, 8, 8)


def test_gamma_per_problem_follows_the_problem_ids():
    spec = StateSpec.euler2d(gamma=torch.tensor([1.2, 1.3, 1.4]))
    fm = Surrogate(Shift(), spec, stochastic=StochasticConfig(dropout=False, input_eps=1e-3))
    scorer = ARMScorer(spec=spec, momentum="sum")
    cfg = TTCConfig(branching_factor=3, project="conservation", chunk_size=2)
    out = TTCGreedy(fm, scorer, cfg).rollout(euler_state(2), 2, problem_ids=torch.tensor([2, 0]))
    assert out.isfinite().all()


@pytest.mark.parametrize("b, chunk, probes", [(2, None, "16 probes are all the same"), (4, 1, "16 probes are all the same")])
def test_the_wrapped_model_is_named_as_the_deterministic_one(b, chunk, probes):
    fm = Surrogate(Shift(), StateSpec.euler2d())
    with pytest.raises(DeterministicModelError, match=rf"^Shift stays deterministic: {probes}"):
        TTCGreedy(fm, ARM, TTCConfig(branching_factor=b, chunk_size=chunk)).rollout(euler_state(1), 1)


@pytest.mark.parametrize("override", [None, {"dropout_p": 0.125, "input_eps": 0.5}])
def test_what_makes_candidates_differ_is_logged_once_and_returned(caplog, override):
    fm = drop_surrogate(p=0.25)
    with caplog.at_level("INFO", logger="ttcfast"):
        r = TTCGreedy(fm, ARM, TTCConfig(branching_factor=2, seed=7, stochastic=override)).rollout(euler_state(), 3, return_info=True)
    rate, eps = (0.25, "0") if override is None else (0.125, "0.5")
    assert caplog.text.count("noise: ") == 1
    assert f"noise: dropout rates [{rate}] at 1 sites, latent_sigma 0, input_eps {eps}, seed 7; StochasticConfig(" in caplog.text
    assert r.stochastic == StochasticConfig.of(override)


def test_a_rollout_without_noise_of_ours_says_so(caplog):
    with caplog.at_level("INFO", logger="ttcfast"):
        alone = TTCGreedy(drop_surrogate(), ARM, TTCConfig(branching_factor=1)).rollout(euler_state(), 1, return_info=True)
        foreign = TTCGreedy(Foreign(), ARM, TTCConfig(branching_factor=2)).rollout(euler_state(), 1, return_info=True)
    assert alone.stochastic is foreign.stochastic is None
    assert "noise: none" in caplog.text and "noise: that of Foreign.sample_next" in caplog.text


class Waits(TorchDispatchMode):
    """Counts the operations whose result's size or value the host needs: on a GPU it waits for them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "unique_consecutive", "_unique2", "masked_select")
        if name in ("index", "index_put_"):
            self.count += any(i is not None and i.dtype == torch.bool for i in args[1])
        return function(*args, **(kwargs or {}))


FIELDS = StateSpec.fields("mask", "h", "u", "v", given="mask", conserved="h", divergence_free=("u", "v"), bounds={"h": (0, 9)})


class Unwatched:
    """A model that asks for no values itself."""

    spec = StateSpec.euler2d()

    def __init__(self, spec=None):
        self.spec = self.spec if spec is None else spec

    def deterministic(self, x):
        return x.roll(1, -1)

    def candidates(self, x, ids, *, problem_ids, seed, step, stochastic=None):
        return x.roll(1, -1).unsqueeze(1) * (1 + 0.01 * torch.rand(len(x), ids.shape[-1], 1, 1, 1))


@pytest.mark.parametrize("scorer", [ARM, last_cell, ARMScorer(spec=FIELDS, budgets={"h": 0.5})], ids=["arm", "function", "fields"])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 6}, {"select": "softmax_mean"}, {"branching_factor": 1}])
def test_a_step_without_incident_waits_for_the_device_once(scorer, options):
    cfg = TTCConfig(**{"branching_factor": 4, **options})
    model, state = Unwatched(getattr(scorer, "spec", None)), euler_state().abs()
    steps = TTCGreedy(model, scorer, cfg).rollout_iter(state, 4)
    next(steps)
    with Waits() as waits:
        next(steps)
    assert waits.count == 1


def test_results_print_in_one_line():
    controller = TTCGreedy(drop_surrogate(), ARM, TTCConfig(branching_factor=4))
    r, step = controller.rollout(euler_state(), 2, return_info=True), controller.step_from(euler_state(), step=1)
    assert re.fullmatch(r"RolloutResult\(3 problems, 2 steps, 24 evaluations, 0 fallbacks, [\d.e-]+ s\)", repr(r))
    assert repr(step) == "StepOutput(3 problems, step 1, 12 evaluations, 0 fallbacks)"
    assert (r.nfe, step.nfe) == (r.evaluations, step.evaluations) and step.fallback is step.fallbacks
