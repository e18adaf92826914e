"""Several models as one: candidates of each in turn, their means, and classical solvers among them."""

import pytest
import torch
from torch import nn

from tests.surrogates import DropNet, draw, drop_surrogate, euler_state, shift_surrogate
from ttcfast.core.base_fm import BaseFM, Surrogate
from ttcfast.models.ensemble import Blend, Ensemble, SolverStep, solves, with_spec
from ttcfast.models.grid_solvers import StepSolver
from ttcfast.physics import SolverError
from ttcfast.spec import StateSpec, StochasticConfig
from ttcfast.states.symmetry import Frames
from ttcfast.stochastic_sampling.noise_site import NoiseSite

SPEC = StateSpec.euler2d()
TURNED = StochasticConfig(dropout=False, symmetry=True)


def solver(factor=0.5):
    """A step that fails where the density of a state is above 1.4 in one cell, as a solver would in a vacuum."""

    def step(x):
        if bool((x[:, 0] > 1.4).any()):
            raise SolverError("the density is too high")
        return factor * x

    return SolverStep(step, SPEC)


def other_surrogate(**options):
    return drop_surrogate(p=0.5, scale=0.05, **options)


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_candidates_are_those_of_the_members_in_turn():
    one, two, x, ids = drop_surrogate(), other_surrogate(), euler_state(3), torch.tensor([7, 0, 4, 9, 1, 2])
    found = draw(Ensemble([one, two, solver()]), x, ids)
    of = {0: draw(one, x, torch.arange(4)), 1: draw(two, x, torch.arange(4)), 2: (0.5 * x).unsqueeze(1).expand(-1, 4, -1, -1, -1)}
    for position, number in enumerate(ids.tolist()):
        near(found[:, position], of[number % 3][:, number // 3])
    assert torch.equal(Ensemble([two, one]).deterministic(x), two.deterministic(x))
    assert torch.equal(Ensemble([solver(), one])(x), 0.5 * x)


def test_ids_for_each_state_and_any_part_of_them_give_the_same_candidates():
    both, x = Ensemble([drop_surrogate(), other_surrogate(), solver()]), euler_state(4)
    ids, problems = torch.tensor([[0, 1, 3], [1, 4, 7], [2, 5, 8], [6, 2, 1]]), torch.tensor([5, 0, 5, 2])
    whole = draw(both, x, torch.arange(9), problem_ids=problems)
    found = draw(both, x, ids, problem_ids=problems)
    for n, row in enumerate(ids):
        near(found[n], whole[n, row])
        near(draw(both, x[n : n + 1], row[1:2], problem_ids=problems[n : n + 1])[0, 0], whole[n, row[1]])


@pytest.mark.parametrize("history", [1, 2])
def test_members_see_the_frames_that_they_know(history):
    long, short = drop_surrogate(history=history), other_surrogate()
    x = euler_state(6).view(3, 2, 4, 8, 8) if history == 2 else euler_state(3)
    latest = x[:, -1] if history == 2 else x
    both, mean = Ensemble([short, long, solver()]), Blend([short, long, solver()])
    assert both.history == mean.history == history
    near(both.deterministic(x), short.deterministic(latest))
    near(mean.deterministic(x), (short.deterministic(latest) + long.deterministic(x) + 0.5 * latest) / 3)
    found = draw(both, x, torch.arange(3, 6))
    near(found, torch.stack([draw(short, latest, torch.tensor([1]))[:, 0], draw(long, x, torch.tensor([1]))[:, 0], 0.5 * latest], 1))


def test_the_time_and_the_problem_reach_the_inputs_of_members():
    class Conditioned(DropNet):
        def forward(self, x, *, nu):
            return super().forward(x) + nu.reshape(-1, 1, 1, 1)

    torch.manual_seed(0)
    nu = torch.tensor([0.1, 0.4, 0.9])
    fm = Surrogate(Conditioned(), SPEC, inputs=lambda c: {"nu": nu[c.problem_ids] + c.time}, time_step=0.5)
    x, ids = euler_state(2), torch.tensor([2, 0])
    both, mean = Ensemble([drop_surrogate(), fm]), Blend([drop_surrogate(), fm])
    assert both.time_step == mean.time_step == 0.5
    near(draw(both, x, torch.tensor([1]), problem_ids=ids)[:, 0], draw(fm, x, torch.tensor([0]), problem_ids=ids)[:, 0])
    own = (drop_surrogate().deterministic(x) + fm.deterministic(x, problem_ids=ids, step=3)) / 2
    near(mean.deterministic(x, problem_ids=ids, step=3), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_blend_is_the_weighted_mean(dtype):
    one, two, x, ids = drop_surrogate(), other_surrogate(), euler_state(2, dtype=dtype), torch.arange(1, 4)
    found, other = draw(Blend([one, two, solver()], [1, 3, 4]), x, ids), draw(Blend([one, two]), x, ids)
    assert found.dtype == dtype
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    expected = draw(one, x, ids) / 8 + draw(two, x, ids) * 3 / 8 + (0.5 * x).unsqueeze(1) / 2
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(other, (draw(one, x, ids) + draw(two, x, ids)) / 2, **close)


def test_a_blend_keeps_the_digits_of_its_states():
    x = torch.rand(2, 4, 8, 8, dtype=torch.float64)
    third = Blend([SolverStep(lambda x: x, SPEC)] * 3, [0.1, 0.3, 0.3])
    torch.testing.assert_close(third.deterministic(x), x, rtol=1e-15, atol=0)
    assert third.deterministic(x.bfloat16()).dtype == torch.bfloat16


class Growth(nn.Module):
    """Acts on every cell alone, and so looks the same in every frame, to the last bit."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x):
        return x + self.rate * x


@pytest.mark.parametrize("kind", [Ensemble, Blend])
def test_equivariant_members_have_equal_candidates_under_all_symmetries(kind):
    members = [Surrogate(Growth(0.1), SPEC), Surrogate(Growth(0.2), SPEC), SolverStep(lambda x: 0.9 * x, SPEC)]
    x = euler_state(2)
    found = draw(kind(members), x, torch.arange(12), stochastic=TURNED)
    own = torch.stack([m.deterministic(x) for m in members], 1).repeat(1, 4, 1, 1, 1)
    assert torch.equal(found, own) if kind is Ensemble else torch.equal(found, found[:, :1].expand_as(found))
    near(found.mean(1), own.mean(1))


def test_under_symmetries_a_member_draws_in_the_frame_of_its_own_id():
    both = Ensemble([drop_surrogate(), solver(), other_surrogate()])
    x, ids = euler_state(2), torch.arange(9).expand(2, 9)
    assert both.own_ids(ids)[0].tolist() == [0, 0, 0, 1, 0, 1, 2, 0, 2]
    found = draw(both, x, ids, stochastic=TURNED)
    frames = Frames(SPEC, (8, 8), both.own_ids(ids), torch.arange(2), seed=3, step=1)
    seen = frames.into(x.unsqueeze(1).expand(2, 9, 4, 8, 8))
    for position in range(9):
        member = both.members[position % 3]
        made = member.deterministic(seen[:, position]).unsqueeze(1).expand(2, 9, 4, 8, 8).contiguous()
        near(found[:, position], frames.back(made)[:, position] if not solves(member) else made[:, 0] * 0 + 0.5 * x)


def test_a_state_that_the_solver_cannot_take_is_nan_for_that_state_alone():
    x = euler_state(3)
    x[1, 0, 2, 2] = 1.5
    step, fm = solver(), drop_surrogate()
    found = step.deterministic(x)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], 0.5 * x[[0, 2]])
    near(draw(Ensemble([fm, step]), x, torch.tensor([1])).squeeze(1), found)
    mean = Blend([fm, step], [1, 3]).deterministic(x)
    near(mean[[0, 2]], (0.25 * fm.deterministic(x) + 0.75 * 0.5 * x)[[0, 2]])
    near(mean[1], fm.deterministic(x)[1])  # the solver's share is left out
    assert Blend([step, step]).deterministic(x)[1].isnan().all()
    x[0, 1, 0, 0] = torch.nan
    again = step.deterministic(x)
    assert again[:2].isnan().all() and torch.equal(again[2], 0.5 * x[2])


def test_the_problem_reaches_a_step_that_takes_it():
    rates, seen = torch.tensor([0.1, 0.2, 0.3]), []

    def step(x, problem_ids):
        seen.append(problem_ids.tolist())
        if 1 in seen[-1] and len(x) > 1:
            raise SolverError("problem 1")
        return rates[problem_ids].reshape(-1, 1, 1, 1) * x

    x, ids = euler_state(2), torch.tensor([2, 0])
    for given in (step, StepSolver(step, (8, 8))):
        one = SolverStep(given, SPEC)
        near(one.deterministic(x, problem_ids=ids), rates[ids].reshape(-1, 1, 1, 1) * x)
        for kind in (Ensemble, Blend):
            found = draw(kind([one, one]), x, problem_ids=ids)
            near(found[:, 0], rates[ids].reshape(-1, 1, 1, 1) * x)
    assert seen and all(each == [2, 0] for each in seen)
    SolverStep(step, SPEC).deterministic(x, problem_ids=torch.tensor([1, 2]))  # fails together, and goes on one by one
    assert seen[-3:] == [[1, 2], [1], [2]]


def test_a_solver_keeps_given_channels_and_the_dtype():
    spec = StateSpec.fields("u", "mask", given="mask")
    x = torch.rand(2, 2, 5, 5)
    found = SolverStep(lambda x: 2 * x.double(), spec).deterministic(x)
    assert found.dtype == torch.float32 and torch.equal(found[:, 1], x[:, 1]) and torch.equal(found[:, 0], 2 * x[:, 0])
    assert SolverStep(torch.sin, spec).deterministic(x).shape == x.shape  # a function without a signature


def test_a_member_without_noise_gives_its_deterministic_step():
    still, fm, x = shift_surrogate(0.0), drop_surrogate(), euler_state(2)
    plain = Surrogate(still.model, SPEC)  # dropout is asked for, and it has none
    for member in (still, plain):
        found = draw(Ensemble([member, fm]), x, torch.arange(6), step=0)
        near(found[:, ::2], member.deterministic(x).unsqueeze(1).expand(-1, 3, -1, -1, -1))
        near(found[:, 1::2], draw(fm, x, torch.arange(3), step=0))
        near(draw(Blend([member, fm]), x, step=0), (member.deterministic(x).unsqueeze(1) + draw(fm, x, step=0)) / 2)


def test_members_around_one_network_draw_each_in_its_own_way():
    one, x = drop_surrogate(), euler_state(2)
    two = one.variant(stochastic=StochasticConfig(dropout=False, input_eps=0.05))
    own = [draw(member, x, torch.arange(3)) for member in (one, two)]
    near(draw(Ensemble([one, two]), x, torch.arange(6)), torch.stack(own, 2).flatten(1, 2))
    near(draw(Blend([one, two]), x, torch.arange(3)), (own[0] + own[1]) / 2)


class Noisy(nn.Module):
    """A sampler of somebody else, whose noise no configuration turns off."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = NoiseSite(0.1)

    def forward(self, x):
        return x + self.noise(x)


def test_noise_that_always_acts_is_drawn_without_dropout_too():
    fm, x, off = Surrogate(Noisy(), SPEC), euler_state(2), StochasticConfig(dropout=False)
    own = draw(fm, x, torch.arange(3), stochastic=off)
    assert not torch.equal(own[:, 0], own[:, 1])
    near(draw(Ensemble([fm, solver()]), x, torch.arange(6), stochastic=off)[:, ::2], own)


def test_ensembles_and_blends_are_members_too():
    one, two, x = drop_surrogate(), other_surrogate(), euler_state(2)
    whole = Ensemble([Blend([one, solver()]), Ensemble([two, one, solver()]), solver()])
    found = draw(whole, x, torch.tensor([3, 4, 5, 7]))
    near(found[:, 0], (draw(one, x, torch.tensor([1]))[:, 0] + 0.5 * x) / 2)
    near(found[:, 1], draw(one, x, torch.tensor([0]))[:, 0])
    near(found[:, 2], 0.5 * x)
    near(found[:, 3], 0.5 * x)
    assert whole.surrogates == [one, two, one] and whole.own_ids(torch.tensor([[3, 4, 5, 7, 10]])).tolist() == [[1, 0, 0, 0, 1]]
    # per state: candidates 0, 3, 6 of the blend, 1, 4, 7 of the inner ensemble (its solver last), 2, 5 of the solver
    assert whole.cost(torch.arange(8).expand(2, 8)) == (2 * (3 + 2), 2 * (1 + 1 + 1))
    near(Blend([whole, two]).deterministic(x), ((one.deterministic(x) + 0.5 * x) / 2 + two.deterministic(x)) / 2)


def test_what_candidates_cost():
    one, two = drop_surrogate(), other_surrogate()
    ids = torch.tensor([[0, 1, 2, 5], [0, 3, 6, 9]])
    assert Ensemble([one, two, solver()]).cost(ids) == (2 + 4, 1)  # 2 and 5 are one step of the solver
    assert Ensemble([one, two]).cost(ids) == (8, 0)
    assert Blend([one, two, solver()]).cost(ids) == (16, 2)
    assert solver().cost(ids) == (0, 2)


def test_another_domain_leaves_the_models_as_they_are():
    one, two = drop_surrogate(), Blend([other_surrogate(), solver()], [1, 3])
    open_box = SPEC.replace(periodic=False)
    changed = with_spec(Ensemble([one, two]), open_box)
    assert changed.spec is open_box and all(m.spec is open_box for m in (*changed.members, *changed.members[1].members))
    assert one.spec.periodic is True and two.spec.periodic is True and two.members[0].spec.periodic is True
    x = euler_state(2)
    near(draw(changed, x), draw(Ensemble([one, two]), x))


@pytest.mark.parametrize("kind", [Ensemble, Blend])
@pytest.mark.parametrize(
    ("members", "error", "says"),
    [
        (lambda: [drop_surrogate(), nn.Linear(2, 2)], TypeError, r"members holds a Linear; give networks as Surrogate\(model, spec\)"),
        (lambda: [drop_surrogate(), BaseFM()], TypeError, "members holds a BaseFM"),
        (lambda: [drop_surrogate(), torch.clone], TypeError, r"solvers as SolverStep\(step, spec\)"),
        (lambda: [drop_surrogate()], ValueError, "members holds 1; give a list of two or more"),
        (drop_surrogate, ValueError, "members is a Surrogate; give a list of two or more"),
        (
            lambda: [drop_surrogate(), SolverStep(torch.clone, StateSpec.fields("u", "v"))],
            ValueError,
            "members have states of density, momentum 0, momentum 1, energy in 2 dimensions and of u, v in 2 dimensions; give models of",
        ),
        (
            lambda: [drop_surrogate(), SolverStep(torch.clone, StateSpec(energy=None, pressure=3, variables="primitive"))],
            ValueError,
            "and of density, velocity 0, velocity 1, pressure in 2",
        ),
        (lambda: [drop_surrogate(time_step=0.1), drop_surrogate(time_step=0.2)], ValueError, r"members step by 0.1 and 0.2; give models"),
    ],
)
def test_members_that_do_not_fit_are_one_clear_error(kind, members, error, says):
    with pytest.raises(error, match=says):
        kind(members())


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")], [2.0, -1.0], []])
def test_weights_that_do_not_fit_are_one_clear_error(weights):
    with pytest.raises(ValueError, match=r"weights is \[.*\] for 2 members; give one positive number for each"):
        Blend([drop_surrogate(), other_surrogate()], weights)


def test_a_step_of_ones_own_says_what_is_wrong():
    with pytest.raises(TypeError, match="step is a float; give a function from states"):
        SolverStep(0.1, SPEC)
    with pytest.raises(TypeError, match="spec is a dict; give the layout of the states"):
        SolverStep(torch.clone, {})
    with pytest.raises(ValueError, match=r"step returned shape \(2, 3, 8, 8\) for states of shape \(2, 4, 8, 8\)"):
        SolverStep(lambda x: x[:, :3], SPEC).deterministic(euler_state(2))
    with pytest.raises(ValueError, match="step returned a list"):
        SolverStep(lambda x: [x], SPEC).deterministic(euler_state(2))


def test_a_step_of_ones_own_goes_with_any_time_step():
    fm = drop_surrogate(time_step=0.05)
    assert SolverStep(StepSolver(torch.clone, (8, 8)), SPEC).time_step is None
    assert Ensemble([fm, SolverStep(StepSolver(torch.clone, (8, 8)), SPEC)]).time_step == 0.05


def test_a_compiled_member_is_compiled_once(monkeypatch):
    """Its calls have one shape, whichever ids fall to it."""
    shapes, x = set(), euler_state(2)

    def called(self, call, compile, *, low=False):
        if compile:
            shapes.add((tuple(call.encoded.shape), len(call.draw.rows)))
        return self._run(self.model, call, low)

    monkeypatch.setattr("ttcfast.core.candidate_forward.CandidateForward._called", called)
    both = Ensemble([drop_surrogate(compile=True), other_surrogate(), solver()])
    plain = Ensemble([drop_surrogate(), other_surrogate(), solver()])
    assert both.compiled and not plain.compiled
    for first in range(6):
        for ids in (torch.arange(first, first + 4), torch.tensor([[first, first + 1, first + 2, first + 3], [first, first + 1, 7, 9]])):
            near(draw(both, x, ids), draw(plain, x, ids))
    assert shapes == {((2, 4, 8, 8), 4)}
