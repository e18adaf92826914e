"""Conditioning: what ``Surrogate(inputs=...)`` gives to each state, whatever is compiled, chunked or rounded."""

from inspect import signature

import pytest
import torch
from torch import nn

from ttcfast.core.base_fm import Surrogate
from ttcfast.core.context import StepContext
from ttcfast.rewards.scorer import Scorer
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.inference import TTCGreedy

SPEC = StateSpec.fields("q")
NU = torch.tensor([0.1, 0.4, 0.9, 0.2])


class Conditioned(nn.Module):
    """Diffuses by a coefficient per state and adds a source that follows time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Conv2d(1, 6, 3, padding=1), nn.Dropout(0.3), nn.Conv2d(6, 1, 1)

    def forward(self, x, *, nu, time):
        hidden = torch.tanh(self.first(x)) * nu.reshape(-1, 1, 1, 1)
        return x + self.last(self.drop(hidden)) + time.reshape(-1, 1, 1, 1)


def inputs(context: StepContext):
    return {"nu": NU[context.problem_ids], "time": 0.0 if context.time is None else context.time}


def surrogate(**options) -> Surrogate:
    torch.manual_seed(0)
    return Surrogate(Conditioned(), SPEC, inputs=inputs, time_step=0.25, **options)


def states(n=4):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def expected(fm, x, step, ids):
    """The deterministic step, state by state, by the model itself."""
    with torch.no_grad():
        return torch.cat([fm.model(x[i : i + 1], nu=NU[[p]], time=torch.tensor([step * 0.25])) for i, p in enumerate(ids)])


def test_every_state_gets_the_conditions_of_its_problem_and_step():
    fm, x, ids = surrogate(), states(3), torch.tensor([2, 0, 3])
    torch.testing.assert_close(fm.deterministic(x, step=5, problem_ids=ids), expected(fm, x, 5, [2, 0, 3]))
    torch.testing.assert_close(fm(x, step=5, problem_ids=ids).detach(), expected(fm, x, 5, [2, 0, 3]))
    torch.testing.assert_close(fm(x).detach(), expected(fm, x, 0, [0, 1, 2]))
    assert fm.sample_next(x, seed=3, multi=True).shape == x.shape


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=["float32", "bfloat16"])
def test_candidates_have_the_conditions_of_their_problem(options):
    fm, x, ids = surrogate(**options), states(), torch.tensor([3, 1, 0, 2])
    together = fm.candidates(x, torch.arange(6), problem_ids=ids, seed=1, step=3)
    alone = [fm.candidates(x[i : i + 1], torch.arange(6), problem_ids=ids[i : i + 1], seed=1, step=3) for i in range(4)]
    close = {"rtol": 1e-3, "atol": 1e-3} if "dtype" in options else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(together, torch.cat(alone), **close)
    if "dtype" in options:
        plain = surrogate().candidates(x, torch.arange(6), problem_ids=ids, seed=1, step=3)
        torch.testing.assert_close(together, plain, rtol=0.02, atol=0.02)
    mean = together.mean(1)
    torch.testing.assert_close(mean, expected(fm, x, 3, ids.tolist()), rtol=0.5, atol=0.5)


def test_compiled_calls_take_the_conditions_as_inputs():
    fm, plain, x = surrogate(compile=True), surrogate(), states(2)
    for step, ids in ((1, torch.tensor([0, 1])), (4, torch.tensor([3, 2]))):  # the second call uses what the first compiled
        key = {"problem_ids": ids, "seed": 0, "step": step}
        torch.testing.assert_close(fm.candidates(x, torch.arange(3), **key), plain.candidates(x, torch.arange(3), **key))
    assert len(fm._candidates._compiled) == 1


class Clock(Scorer):
    """Prefers candidates with a high mean, and notes the times and problems that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, float | None, tuple[int, ...]]] = []

    def score_group(self, state, candidates, context):
        self.seen.append((context.step, context.time, tuple(context.problem_ids.tolist())))
        return candidates.mean((2, 3, 4))


@pytest.mark.parametrize("controller, cfg", [(TTCGreedy, {}), (TTCBeam, {"approach": "beam", "beam_width": 2, "lookahead": 1})])
def test_searches_agree_over_chunks_and_hand_the_time_to_scorers(controller, cfg):
    clock, x = Clock(), states()
    whole = controller(surrogate(), clock, TTCConfig(branching_factor=4, **cfg)).rollout(x, 3)
    parts = controller(surrogate(), Clock(), TTCConfig(branching_factor=4, chunk_size=2, **cfg)).rollout(x, 3)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)
    alone = controller(surrogate(), Clock(), TTCConfig(branching_factor=4, **cfg)).rollout(x[2:3], 3, problem_ids=torch.tensor([2]))
    torch.testing.assert_close(whole[2:3], alone, rtol=1e-5, atol=1e-5)
    assert {(step, time) for step, time, _ in clock.seen} >= {(0, 0.0), (1, 0.25), (2, 0.5)}


@pytest.mark.parametrize(
    "given, message",
    [
        (
            lambda c: {"nu": torch.ones(7), "time": 0.0},
            r"inputs returned 'nu' of \(7,\) for 4 states; return a number, or a tensor with one",
        ),
        (lambda c: {"nu": "high", "time": 0.0}, "inputs returned 'nu' of str for 4 states"),
        (lambda c: [1.0], "inputs returned a list; return a dict"),
        (
            lambda c: {"nu": 0.1, "time": c.time},
            r"inputs returned 'time' of None, and the time is not known; give Surrogate\(..., time_step=\)",
        ),
    ],
)
def test_conditions_of_another_length_are_one_clear_error(given, message):
    fm = Surrogate(Conditioned(), SPEC, inputs=given)
    with pytest.raises(ValueError, match=message):
        fm.deterministic(states())


class Loose(nn.Module):
    def forward(self, x, **more):
        return x + more["nu"].reshape(-1, 1, 1, 1)


def test_a_keyword_that_the_model_does_not_take_is_one_clear_error():
    fm = Surrogate(Conditioned(), SPEC, inputs=lambda c: {"nu": 0.1, "time": 0.0, "dt": 0.5})
    says = r"inputs returned 'dt' and Conditioned.forward takes no such argument besides the state \(it takes nu, time\); give it that"
    for call in (fm.deterministic, fm, lambda x: fm.candidates(x, torch.arange(3), seed=0, step=0)):
        with pytest.raises(ValueError, match=says):
            call(states())
    plain = Surrogate(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)), SPEC, inputs=lambda c: {"input": 1.0})
    with pytest.raises(ValueError, match=r"inputs returned 'input' and Sequential.forward .* \(it takes none\)"):
        plain.deterministic(states())  # the name of the state itself


def test_what_takes_any_keyword_or_has_hooks_for_them_is_called(monkeypatch):
    x = states()
    torch.testing.assert_close(Surrogate(Loose(), SPEC, inputs=lambda c: {"nu": 0.5}).deterministic(x), x + 0.5)
    net = nn.Conv2d(1, 1, 3, padding=1)
    net.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + kwargs["nu"].reshape(-1, 1, 1, 1),), {}), with_kwargs=True)
    with torch.no_grad():
        torch.testing.assert_close(Surrogate(net, SPEC, inputs=lambda c: {"nu": 0.5}).deterministic(x), net(x, nu=torch.full((4,), 0.5)))
    read = []
    monkeypatch.setattr("ttcfast.core.context.inspect.signature", lambda function: read.append(function) or signature(function))
    fm = surrogate()
    for step in range(3):
        fm.deterministic(x, step=step)
    assert len(read) == 1


def test_numbers_come_in_the_dtype_of_the_model():
    fm, wide = surrogate(), Surrogate(Conditioned(), SPEC, inputs=lambda context: {"nu": 0.25, "time": 0.5})
    wide.model.load_state_dict(fm.model.state_dict())
    x = states(2)
    with torch.no_grad():
        alone = wide.model(x, nu=torch.full((2,), 0.25), time=torch.full((2,), 0.5))
    found = wide.deterministic(x.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), alone)


def test_the_probe_of_memory_scores_a_time_that_exists():
    class OfTime(Clock):
        def score_group(self, state, candidates, context):
            assert context.time == context.step * 0.25
            return super().score_group(state, candidates, context)

    TTCBeam(surrogate(), OfTime(), TTCConfig(branching_factor=4, approach="beam", memory_budget=1 << 30)).rollout(states(), 2)
