"""Every operation under every transform of torch: forward mode, torch.func and gradients of gradients, against what is known without."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ttcfast import ARMWeights, integrate, ops
from ttcfast.ops import VelocityMLP
from ttcfast.spec import Key, StateSpec

KEY = Key(3)
ROWS = torch.tensor([[0, 0], [0, 1], [0, 2]])
WEIGHTS = ARMWeights(w_mass=1.0, w_momentum=0.7, w_energy=0.5, w_bc=0.3, w_positivity=2.0)


class Case(NamedTuple):
    """An operation as a function of float64 tensors alone, and tensors at which it is smooth."""

    function: Callable[..., Tensor]
    inputs: list[Tensor]
    tolerance: float = 1e-10


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def arm(momentum: str, scale: str, variables: str) -> Case:
    spec = StateSpec.euler2d() if variables == "conserved" else StateSpec.pdegym()
    spec = spec.replace(boundary_mask=torch.tensor([[True, False, False], [True, False, False]]), boundary_value=0.3)
    state = 1 + 0.1 * draw(1, spec.num_channels, 2, 3)
    candidates = state.unsqueeze(1) + 0.3 * draw(1, 2, spec.num_channels, 2, 3)
    candidates[0, 1, 0, 0, 0] = -0.5  # a density below 0: the penalty of positivity acts

    def all_terms(candidates: Tensor) -> Tensor:
        return torch.stack(ops.arm(state, candidates, spec, WEIGHTS, momentum=momentum, scale=scale)[:6])

    return Case(all_terms, [candidates])


def mlp_flow(method: str) -> Case:
    sizes, times = [8, 5, 4, 8], 2 + (method == "heun")
    weights = [draw(o, i) / i**0.5 for i, o in itertools.pairwise(sizes)]
    inputs = [draw(2, 8).softmax(-1), draw(2, 5), draw(times, 5), *weights, draw(4), draw(8), draw(5), draw(4), draw(5), draw(4)]

    def flat(z: Tensor, rows: Tensor, times: Tensor, *rest: Tensor) -> Tensor:
        parts = [list(rest[i:j]) for i, j in itertools.pairwise((0, 3, 5, 7, 9))]
        return ops.mlp_flow(z, rows, times, VelocityMLP(*parts), method=method, group=4)

    return Case(flat, inputs)


def make(name: str) -> Case:
    torch.manual_seed(0)
    ids = torch.randperm(14).reshape(2, 7)
    cases: dict[str, Callable[[], Case]] = {
        "heun_predict": lambda: Case(lambda z, k: ops.heun_predict(z, k, 0.3, group=2), [draw(2, 4), draw(2, 4)]),
        "heun_correct": lambda: Case(lambda z, k1, k2: ops.heun_correct(z, k1, k2, 0.3, group=4), [draw(2, 4), draw(2, 4), draw(2, 4)]),
        "integrate": lambda: Case(lambda z, w: integrate(lambda z, t: torch.sin(z @ w) * (1 + t), z), [draw(2, 3), draw(3, 3)]),
        "norm_mish": lambda: Case(
            lambda x, rows, bias, scale, shift: ops.norm_mish(x, bias, scale, shift, rows=rows),
            [draw(3, 5), draw(3, 5), draw(5), draw(5), draw(5)],
        ),
        "mlp_flow heun": lambda: mlp_flow("heun"),
        "mlp_flow euler": lambda: mlp_flow("euler"),
        "add_noise": lambda: Case(
            lambda x: ops.add_noise(x, 3, 0.2, key=KEY, rows=ROWS, antithetic=True).sin(), [draw(1, 4, 2)], 1e-6
        ),  # backends' float32 normals
        "keyed_dropout": lambda: Case(lambda x: ops.keyed_dropout(x, 0.4, key=KEY, rows=ROWS, antithetic=True).sin(), [draw(3, 6)]),
        "topk": lambda: Case(lambda s: ops.topk(s, 3)[0].sin(), [draw(2, 7)]),
        "topk of ids": lambda: Case(lambda s: ops.topk(s, 3, ids=ids)[0].sin(), [draw(2, 7)]),
        **{
            f"arm {momentum} {scale} {variables}": lambda m=momentum, s=scale, v=variables: arm(m, s, v)
            for momentum, scale, variables in [
                ("sum", "absolute", "conserved"),
                ("components", "relative", "primitive"),
                ("norm", "absolute", "primitive"),
                ("norm", "relative", "conserved"),
            ]
        },
    }
    return cases[name]() if name else cases  # type: ignore[return-value]


NAMES = list(make(""))


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return make(request.param)


def leaves(case: Case) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in case.inputs]


def scalar(case: Case) -> Callable[..., Tensor]:
    """A function whose gradient depends on every result."""
    return lambda *tensors: case.function(*tensors).square().sum()


def gradient(case: Case) -> list[Tensor]:
    """By the operation's own backward pass, which the tests of the operation hold to finite differences."""
    given = leaves(case)
    return list(torch.autograd.grad(scalar(case)(*given), given))


def close(found, expected, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_forward_mode_agrees_with_finite_differences(case):
    tangents, h = [torch.randn_like(t) for t in case.inputs], 1e-6
    ends = [case.function(*(t + sign * h * d for t, d in zip(case.inputs, tangents))) for sign in (1, -1)]
    expected, value = (ends[0] - ends[1]) / (2 * h), case.function(*case.inputs)
    assert expected.abs().max() > 1e-2
    for found in (torch.func.jvp(case.function, tuple(case.inputs), tuple(tangents)), by_dual_numbers(case, tangents)):
        close(found[0], value, case.tolerance)
        close(found[1], expected, max(1e-7, case.tolerance))
    value_there, linear = torch.func.linearize(case.function, *case.inputs)
    close(value_there.detach(), value, case.tolerance)
    close(linear(*tangents), expected, max(1e-7, case.tolerance))


def by_dual_numbers(case: Case, tangents: list[Tensor]) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(case.inputs, tangents)]
        return tuple(forward_ad.unpack_dual(case.function(*duals)))


def test_torchs_own_check_of_every_mode(case):
    """Forward mode, and many gradients or tangents at once, through the backward pass of the operation and through its definition."""
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(case.function, leaves(case), check_forward_ad=True, **batched)


def test_gradients_of_gradients_agree_with_finite_differences(case):
    assert torch.autograd.gradgradcheck(case.function, leaves(case), check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


def test_torch_func_gives_the_gradients_of_backward(case):
    places, expected = tuple(range(len(case.inputs))), gradient(case)
    for found in (
        torch.func.grad(scalar(case), places)(*case.inputs),
        torch.func.vjp(scalar(case), *case.inputs)[1](torch.tensor(1.0).double()),
    ):
        for f, e in zip(found, expected):
            close(f, e, case.tolerance)
    rows = torch.func.jacrev(case.function, places)(*case.inputs), torch.func.jacfwd(case.function, places)(*case.inputs)
    for by_rows, by_columns in zip(*rows):
        close(by_rows, by_columns)


def test_hessians_of_either_nesting_agree(case):
    given = leaves(case)
    (first,) = torch.autograd.grad(scalar(case)(*given), given[:1], create_graph=True)
    direction = torch.randn_like(first)
    (expected,) = torch.autograd.grad((first * direction).sum(), given[:1])

    def along(x: Tensor) -> Tensor:
        return scalar(case)(x, *case.inputs[1:])

    close(torch.func.jvp(torch.func.grad(along), (case.inputs[0],), (direction,))[1], expected, case.tolerance)
    close(torch.func.grad(lambda x: torch.func.jvp(along, (x,), (direction,))[1])(case.inputs[0]), expected, case.tolerance)


def test_vmap_is_a_loop(case):
    """Over every input alone, along its last axis, and over all of them: parameters too, as in an ensemble."""
    scales = torch.tensor([1.0, 1.1, 0.9], dtype=torch.float64)
    for moved in [(i,) for i in range(len(case.inputs))] + [tuple(range(len(case.inputs)))]:
        stacked = [torch.stack([s * t for s in scales], -1) if i in moved else t for i, t in enumerate(case.inputs)]
        axes = tuple(-1 if i in moved else None for i in range(len(stacked)))
        each = [[t[..., b] if i in moved else t for i, t in enumerate(stacked)] for b in range(len(scales))]
        close(torch.vmap(case.function, axes)(*stacked), torch.stack([case.function(*tensors) for tensors in each]), case.tolerance)
        found = torch.vmap(torch.func.grad(scalar(case)), axes)(*stacked)
        close(found, torch.stack([gradient(Case(case.function, tensors))[0] for tensors in each]), case.tolerance)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("arm")] + ["arm sum absolute conserved"])
def test_compiled_transforms_are_those_of_eager_mode(name):
    torch._dynamo.reset()
    case = make(name)
    tangents = tuple(torch.randn_like(t) for t in case.inputs)

    def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(case.function, tensors, tangents)[1], torch.func.grad(scalar(case))(*tensors)

    for f, e in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(*case.inputs), both(*case.inputs)):
        close(f, e)
