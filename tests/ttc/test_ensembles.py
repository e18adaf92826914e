"""Searches over several models and classical solvers: the same rollout in any chunks, and what it costs."""

import logging

import pytest
import torch

from tests.scorers import last_cell
from tests.surrogates import drop_surrogate, euler_state
from ttcfast.core.base_fm import Surrogate
from ttcfast.models.ensemble import Blend, Ensemble, SolverStep
from ttcfast.physics import SolverError
from ttcfast.rewards.common import ScorerList
from ttcfast.runtime.errors import CheckpointError
from ttcfast.spec import StateSpec, StochasticConfig, TTCConfig
from ttcfast.stochastic_sampling.distinct import DeterministicModelError
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.budget import Budget
from ttcfast.ttc.candidates import Chunks
from ttcfast.ttc.inference import TTCGreedy

SPEC = StateSpec.euler2d()
GROUP = ScorerList([last_cell], zscore=True)  # which needs all candidates of a step together


class Counted(Surrogate):
    """Counts the states that go through it."""

    rows = 0

    def deterministic(self, x, **options):
        self.rows += len(x)
        return super().deterministic(x, **options)

    def candidates(self, x, ids, **options):
        self.rows += len(x) * ids.shape[-1]
        return super().candidates(x, ids, **options)


class Solver(SolverStep):
    """A step that counts its states and fails for those with a high density in the last cell."""

    def __init__(self, limit=9.0):
        super().__init__(self.solve, SPEC)
        self.limit, self.rows = limit, 0

    def solve(self, x):
        if bool((x[:, 0, -1, -1] > self.limit).any()):
            raise SolverError("the density is too high")
        self.rows += len(x)
        return x + 0.01 * x.roll(1, -1)


def counted(scale=0.01, **options):
    plain = drop_surrogate(scale=scale, **options)
    return Counted(plain.model, plain.spec, predicts="delta", history=plain.history)


MODELS = {
    "two surrogates": lambda: Ensemble([counted(), counted(0.05)]),
    "surrogate and solver": lambda: Ensemble([counted(), Solver()]),
    "solver first": lambda: Ensemble([Solver(), counted(), counted(0.05)]),
    "blend of two": lambda: Blend([counted(), counted(0.05)]),
    "blend with solver": lambda: Blend([counted(), Solver()], [1, 2]),
    "nested": lambda: Ensemble([Blend([counted(), Solver()]), counted(0.05), Solver()]),
}
SEARCHES = {
    "greedy": {"branching_factor": 5},
    "mean": {"branching_factor": 5, "select": "mean"},
    "lookahead": {"branching_factor": 4, "lookahead": 1},
    "beam": {"branching_factor": 5, "beam_width": 2, "approach": "beam"},
    "particles": {"branching_factor": 4, "beam_width": 2, "approach": "particle"},
    "refined": {"branching_factor": 3, "lookahead": 1, "refine_steps": 1},
    "without the deterministic step": {"branching_factor": 4, "include_deterministic": False},
}


class Smooth(ScorerList):
    """Climbs, so that candidates can be refined."""

    def ascent(self, state, candidates, context):
        return 1e-3 * torch.ones_like(candidates)


def roll(fm, x0, steps=3, *, scorer=last_cell, budget=None, resume=None, **options):
    cfg = TTCConfig(**{"max_resample": 1, **options})
    scorer = Smooth([last_cell]) if cfg.refine_steps else scorer
    controller = TTCBeam if cfg.approach != "greedy" or cfg.lookahead or resume is not None else TTCGreedy
    return controller(fm, scorer, cfg).rollout(x0, steps, return_info=True, budget=budget, resume=resume)


def rows_of(fm):
    """States that went through surrogates and through solvers."""
    parts = [m for m in fm.modules() if isinstance(m, (Counted, Solver))]
    return tuple(sum(m.rows for m in parts if isinstance(m, kind)) for kind in (Counted, Solver))


@pytest.mark.parametrize(
    ("model", "search"),
    [*((model, "beam") for model in MODELS), *(("nested", search) for search in SEARCHES if search != "beam"), ("solver first", "greedy")],
)
def test_every_state_through_a_model_is_counted(model, search):
    fm = MODELS[model]()
    found = roll(fm, euler_state(3), **SEARCHES[search])
    assert found.trajectory.isfinite().all()
    assert (found.evaluations, found.solver_steps) == rows_of(fm)
    assert found.evaluations > 0 and (found.solver_steps > 0) == ("solver" in model or model == "nested")


@pytest.mark.parametrize("model", ["surrogate and solver", "solver first", "nested"])
def test_a_group_that_is_scored_together_is_counted_alike(model):
    fm = MODELS[model]()
    found = roll(fm, euler_state(2), scorer=GROUP, branching_factor=5)
    assert (found.evaluations, found.solver_steps) == rows_of(fm)


@pytest.mark.parametrize(
    ("model", "search"), [("two surrogates", "particles"), ("solver first", "greedy"), ("blend with solver", "beam"), ("nested", "beam")]
)
def test_chunks_change_nothing(model, search):
    x0 = euler_state(3)
    whole = roll(MODELS[model](), x0, **SEARCHES[search])
    for chunk in (1, 2):
        found = roll(MODELS[model](), x0, chunk_size=chunk, **SEARCHES[search])
        torch.testing.assert_close(found.trajectory, whole.trajectory, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.chosen, whole.chosen) and found.evaluations == whole.evaluations


def test_the_mean_of_as_many_candidates_as_members_is_the_plain_ensemble():
    members, x0 = [counted(), counted(0.05), Solver()], euler_state(2)
    found = roll(Ensemble(members), x0, branching_factor=3, select="mean", stochastic={"dropout": False})
    x = x0
    for step in range(3):
        x = torch.stack([m.deterministic(x) for m in members]).mean(0)
        torch.testing.assert_close(found.trajectory[:, step + 1], x, rtol=1e-5, atol=1e-6)


def test_a_step_that_the_solver_cannot_make_is_never_kept():
    x0 = euler_state(3)
    x0[1, 0, -1, -1] = 1.3
    found = roll(Ensemble([counted(), Solver(1.25)]), x0, 1, branching_factor=4, scorer=lambda x, c: c[:, 0].mean((1, 2)))
    assert (found.chosen[0, 0] % 2, found.chosen[2, 0] % 2) == (1, 1)  # the solver adds mass, which this reward likes
    assert found.chosen[1, 0] % 2 == 0 and found.nonfinite[1, 0] == 2 and found.nonfinite.sum() == 2
    assert found.trajectory.isfinite().all()
    blended = roll(Blend([counted(), Solver(1.25)]), x0, 1, branching_factor=1)
    torch.testing.assert_close(blended.trajectory[1, 1], counted().deterministic(x0)[1])


@pytest.mark.parametrize(
    ("model", "options"),
    [
        *((model, {}) for model in MODELS),
        ("blend of two", {"lookahead": 1}),
        ("nested", {"beam_width": 2, "approach": "beam"}),
        ("solver first", {"include_deterministic": False}),
    ],
)
def test_a_budget_holds_whatever_a_step_costs(model, options):
    x0, spent = euler_state(2), []
    still = MODELS[model]().cost(torch.zeros(2, 1, dtype=torch.int64))[0]  # of one step
    for evaluations in (10 * still + 20, 10 * still + 57):
        fm = MODELS[model]()
        found = roll(fm, x0, 5, branching_factor=3, budget=Budget(evaluations), **options)
        assert (found.evaluations, found.solver_steps) == rows_of(fm) and found.evaluations <= evaluations
        assert found.trajectory.shape[1] == 6
        spent.append(found.searched)
    assert spent[0] <= spent[1] and spent[1] > 0


def test_a_budget_below_the_deterministic_rollout_says_what_that_takes():
    with pytest.raises(ValueError, match="evaluations is 19 and the deterministic rollout of 2 problems over 5 steps takes 20; give at"):
        roll(MODELS["blend of two"](), euler_state(2), 5, branching_factor=3, budget=Budget(19))
    free = roll(MODELS["solver first"](), euler_state(2), 5, branching_factor=3, budget=Budget(1))  # its solver is no evaluation
    assert free.searched == 0 and free.evaluations == 0 and free.solver_steps == 10


def test_groups_drawn_again_are_counted():
    x0 = euler_state(2)
    x0[0, 0, -1, -1] = 1.3
    fm = Ensemble([Solver(1.25), Solver(1.25)])
    with pytest.warns(RuntimeWarning, match="no finite next state for problems"):
        found = roll(fm, x0, 1, branching_factor=1, include_deterministic=False, max_resample=2)
    assert found.resamples[0, 0] == 2 and found.frozen.any() and found.evaluations == 0
    assert found.solver_steps == 2 + 2 + 1  # both states, the first one twice more, and its fallback


class Killed(Exception):
    pass


@pytest.mark.parametrize("model", ["surrogate and solver", "nested"])
def test_a_killed_rollout_goes_on_with_the_same_counts(model, tmp_path):
    x0, left = euler_state(2), [10**6]

    def scorer(x_t, cand_tp1):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return cand_tp1[:, 0, -1, -1]

    options = {"branching_factor": 4, "beam_width": 2, "approach": "beam", "scorer": scorer}
    whole = roll(MODELS[model](), x0, 4, **options)
    left[0] = 2 * len(x0)
    with pytest.raises(Killed):
        roll(MODELS[model](), x0, 4, resume=tmp_path, **options)
    left[0] = 10**6
    found = roll(MODELS[model](), x0, 4, resume=tmp_path, **options)
    assert torch.equal(found.trajectory, whole.trajectory)
    assert (found.evaluations, found.solver_steps) == (whole.evaluations, whole.solver_steps)


def test_a_folder_of_other_members_or_weights_is_refused(tmp_path):
    x0, cfg = euler_state(1), {"branching_factor": 3, "beam_width": 2, "approach": "beam"}
    roll(Blend([drop_surrogate(), drop_surrogate(scale=0.05)], [1, 3]), x0, 2, resume=tmp_path, **cfg)
    with pytest.raises(CheckpointError, match=r"model.weights.0 is 0.5, there 0.25"):
        roll(Blend([drop_surrogate(), drop_surrogate(scale=0.05)]), x0, 2, resume=tmp_path, **cfg)
    with pytest.raises(CheckpointError, match="holds a rollout of another configuration: model"):
        roll(Blend([drop_surrogate(), drop_surrogate(scale=0.02)], [1, 3]), x0, 2, resume=tmp_path, **cfg)


def test_history_goes_through_a_search():
    x0, long, short = euler_state(4).view(2, 2, 4, 8, 8), counted(history=2), counted()
    fm = Ensemble([long, short, Solver()])
    found = roll(fm, x0, 2, branching_factor=3, select="mean", stochastic={"dropout": False})
    first = (long.deterministic(x0) + short.deterministic(x0[:, -1]) + fm.members[2].deterministic(x0[:, -1])) / 3
    torch.testing.assert_close(found.trajectory[:, 1], first, rtol=1e-5, atol=1e-6)
    window = torch.stack([x0[:, -1], first], 1)
    second = (long.deterministic(window) + short.deterministic(first) + fm.members[2].deterministic(first)) / 3
    torch.testing.assert_close(found.trajectory[:, 2], second, rtol=1e-5, atol=1e-6)


class Slightly(torch.nn.Module):
    def forward(self, x):
        return x + 1e-4


def test_refinement_happens_in_the_frame_of_the_members_candidate():
    """A reward that looks the same in no frame moves the candidates of two equal members alike, and the solver's in the identity's."""

    class Leans(Smooth):
        def ascent(self, state, candidates, context):
            move = torch.zeros_like(candidates)
            move[..., 0, 0] = 0.01
            return move

    turned = StochasticConfig(dropout=False, symmetry=True)
    cfg = TTCConfig(branching_factor=6, refine_steps=1, refine_lengths=(1.0,), select="mean", trust=None, stochastic=turned)
    x0 = euler_state(1)
    still, same = Surrogate(Slightly(), SPEC), SolverStep(torch.clone, SPEC)
    moved = TTCGreedy(Ensemble([still, same]), Leans([last_cell]), cfg).rollout(x0, 1)[:, 1] - (x0 + 0.5e-4)
    per_cell = moved[0, 0].flatten()
    assert float(per_cell[0]) >= 0.01 * 4 / 6 - 1e-6  # the solver's three candidates, and the first of the surrogate
    torch.testing.assert_close(per_cell.sum(), torch.tensor(0.01), rtol=1e-3, atol=1e-5)
    assert int((per_cell > 1e-4).sum()) > 1


@pytest.mark.parametrize("search", [{}, {"chunk_size": 2}, {"approach": "beam", "beam_width": 3}])
def test_the_cost_of_a_surrogate_alone_is_known_without_its_ids(search, monkeypatch):
    """Ids are made on the host, and making them there waits for the device at every chunk."""
    monkeypatch.setattr(Chunks, "ids_of", lambda *given: pytest.fail("asked for ids"))
    fm = drop_surrogate()
    rolled = TTCBeam(fm, last_cell, TTCConfig(branching_factor=5, **search)).rollout(euler_state(), 2, return_info=True)
    assert rolled.evaluations == 3 * 5 * (1 + search.get("beam_width", 1)) and rolled.solver_steps == 0


def test_a_solver_alone_rolls_out_and_is_one_candidate():
    fm, x0 = Solver(), euler_state(2)
    found = roll(fm, x0, 2, branching_factor=1)
    assert (found.evaluations, found.solver_steps) == (0, 4) == rows_of(fm)
    with pytest.raises(DeterministicModelError, match="Solver stays deterministic"):
        roll(fm, x0, 2, branching_factor=3)


def test_the_log_names_the_dropout_of_all_members(caplog):
    fm = Ensemble([drop_surrogate(p=0.3), Blend([drop_surrogate(p=0.5), Solver()])])
    with caplog.at_level(logging.INFO, "ttcfast"):
        roll(fm, euler_state(1), 1, branching_factor=3)
    assert "dropout rates [0.3, 0.5] at 2 sites" in caplog.text
