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


def mlp(sets: tuple[int, ...] = ()) -> Case:
    sizes = [3, 5, 4]
    weights = [draw(*sets, o, i) / i**0.5 for i, o in itertools.pairwise(sizes)]
    inputs = [draw(*sets, 2, 3), draw(*sets, 2, 5), *weights, draw(*sets, 5), draw(*sets, 4), draw(*sets, 5), draw(*sets, 5)]

    def flat(x: Tensor, rows: Tensor, *rest: Tensor) -> Tensor:
        return ops.mlp(x, ops.MLP(list(rest[:2]), list(rest[2:4]), [rest[4]], [rest[5]]), rows=rows)

    return Case(flat, inputs)


def closed_loop() -> Case:
    """States and actions of two steps, as a function of everything: the dynamics' parameters too."""
    policy = [draw(4, 4) / 2, draw(2, 4) / 2, draw(4), draw(2), draw(4), draw(4)]
    network = [draw(5, 4) / 2, draw(4, 5) / 2, draw(4), draw(5), draw(5)]

    def flat(z: Tensor, offsets: Tensor, weight: Tensor, times: Tensor, *rest: Tensor) -> Tensor:
        p, n = rest[:6], rest[6:]
        parts = ops.MLP([p[0], p[1]], [p[2], p[3]], [p[4]], [p[5]]), VelocityMLP([n[0], n[1]], [n[2]], [n[3]], [n[4]])
        states, actions = ops.closed_loop(z, offsets, parts[0], weight, times, parts[1], method="euler", substeps=1, group=2)
        return torch.cat([states.flatten(), actions.flatten()])

    return Case(flat, [draw(2, 4), draw(2, 2, 2), draw(5, 2), draw(1, 5), *policy, *network])


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
        "mlp": mlp,
        "mlp of two networks": lambda: mlp((2,)),
        "closed_loop": closed_loop,
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


def by_dual_numbers(case: Case, tangents: list[Tensor]) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(case.inputs, tangents)]
        return tuple(forward_ad.unpack_dual(case.function(*duals)))


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(("arm", "mlp_flow euler"))] + ["arm norm relative conserved"])
def test_linearize_is_forward_mode(name):
    case = make(name)
    tangents = [torch.randn_like(t) for t in case.inputs]
    expected = torch.func.jvp(case.function, tuple(case.inputs), tuple(tangents))
    value, linear = torch.func.linearize(case.function, *case.inputs)
    close(value.detach(), expected[0], case.tolerance)
    close(linear(*tangents), expected[1], case.tolerance)


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


# One of each operation: Heun's loop holds Euler's steps.
@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(("arm", "mlp_flow euler"))] + ["arm sum absolute conserved"])
def test_compiled_transforms_are_those_of_eager_mode(name):
    torch._dynamo.reset()
    case = make(name)
    tangents = tuple(torch.randn_like(t) for t in case.inputs)

    def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(case.function, tensors, tangents)[1], torch.func.grad(scalar(case))(*tensors)

    for f, e in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(*case.inputs), both(*case.inputs)):
        close(f, e)


def test_keyed_rows_under_vmap_are_explicit():
    """Every row draws its own numbers, whatever ``randomness`` says: under vmap as in a loop."""
    rows = torch.stack([ROWS, ROWS + 5])
    x = draw(2, 3, 4)
    calls: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, rows: ops.keyed_dropout(x, 0.4, key=KEY, rows=rows),
        lambda x, rows: ops.add_noise(x, 1, 0.4, key=KEY, rows=rows),
        lambda x, rows: x + ops.normal(3, (4,), key=KEY, rows=rows),
    ]
    for call in calls:
        for randomness in ("error", "same", "different"):
            found = torch.vmap(call, randomness=randomness)(x, rows)
            close(found, torch.stack([call(*pair) for pair in zip(x, rows)]), 1e-6)


def test_no_derivative_comes_from_a_candidate_that_is_not_finite():
    """Its score is -inf: as in the backward pass its derivatives are 0, and the others' are what they are without it."""
    case = make("arm norm absolute primitive")
    (good,) = case.inputs
    bad = torch.cat([good] * 3, 1)[:, :5]
    bad[0, 2, 1, 0, 1], bad[0, 3, 3, 1, 1] = float("nan"), float("inf")
    bad[0, 4] *= 1e200  # finite, and its penalties are not
    tangent = torch.randn_like(bad)

    def scores(candidates: Tensor) -> Tensor:
        return case.function(candidates)[0]

    value, along = torch.func.jvp(scores, (bad,), (tangent,))
    assert torch.equal(value[0, 2:], torch.full((3,), -float("inf"), dtype=torch.float64))
    close(along[:, :2], torch.func.jvp(scores, (good,), (tangent[:, :2],))[1])
    assert torch.equal(along[:, 2:], torch.zeros(1, 3, dtype=torch.float64))
    leaf = bad.clone().requires_grad_()
    (backward,) = torch.autograd.grad(scores(leaf).sum(), leaf, create_graph=True)
    by_grad = torch.func.grad(lambda c: scores(c).sum())(bad)
    for found in (backward, by_grad, torch.autograd.grad(backward.sum(), leaf)[0]):
        assert found.isfinite().all() and not found[:, 2:].any()
    close(by_grad, backward)


def test_the_state_is_held_constant_in_forward_mode_too():
    case, spec = make("arm sum absolute conserved"), StateSpec.euler2d()
    state, candidates = 1 + 0.1 * draw(1, 4, 2, 3), case.inputs[0]
    _, along = torch.func.jvp(lambda x, c: ops.arm(x, c, spec).score, (state, candidates), (draw(1, 4, 2, 3), torch.ones_like(candidates)))
    close(along, torch.func.jvp(lambda c: ops.arm(state, c, spec).score, (candidates,), (torch.ones_like(candidates),))[1])


def differentiate(function: Callable[[Tensor], object], value: float | Tensor) -> list[Callable[[], object]]:
    """The three ways of asking for the derivative of ``function`` in a tensor."""
    x = torch.as_tensor(value, dtype=torch.float64)

    def dual() -> object:
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(x, torch.ones_like(x)))

    return [lambda: function(x.clone().requires_grad_()), dual, lambda: torch.func.jvp(function, (x,), (torch.ones_like(x),))]


Z, C, X = (
    torch.ones(2, 4, dtype=torch.float64),
    1.1 * torch.ones(1, 2, 4, 2, 3, dtype=torch.float64),
    torch.ones(1, 4, 2, 3, dtype=torch.float64),
)


@pytest.mark.parametrize(
    ("name", "function", "value"),
    [
        ("dt", lambda v: ops.heun_predict(Z, Z, v), 0.1),
        ("dt", lambda v: ops.heun_correct(Z, Z, Z, v), 0.1),
        ("eps", lambda v: ops.norm_mish(Z, Z[0], Z[0], Z[0], eps=v), 1e-5),
        ("eps", lambda v: ops.mlp_flow(Z, Z, Z[[0, 0, 0]], VelocityMLP([Z.new_ones(4, 4)] * 2, [Z[0]], [Z[0]], [Z[0]]), eps=v), 1e-5),
        ("eps", lambda v: ops.mlp(Z, ops.MLP([Z.new_ones(4, 4)] * 2, [Z[0]] * 2, [Z[0]], [Z[0]]), eps=v), 1e-5),
        ("sigma", lambda v: ops.add_noise(Z, 1, v, key=KEY, rows=ROWS[:2]), 0.1),
        ("p", lambda v: ops.keyed_dropout(Z, v, key=KEY, rows=ROWS[:2]), 0.1),
        ("gamma", lambda v: ops.arm(X, C, StateSpec.euler2d(gamma=v)).score, torch.tensor([1.4])),
        ("cell_volume", lambda v: ops.arm(X, C, StateSpec.euler2d(cell_volume=v)).score, torch.ones(2, 3)),
        (
            "boundary_value",
            lambda v: ops.arm(X, C, StateSpec.euler2d(boundary_mask=torch.ones(2, 3, dtype=torch.bool), boundary_value=v)).score,
            torch.ones(4, 1, 1),
        ),
        ("w_mass", lambda v: ops.arm(X, C, StateSpec.euler2d(), ARMWeights(w_mass=v)).score, 0.5),
    ],
)
def test_what_an_operation_holds_constant_cannot_be_differentiated_silently(name, function, value):
    for ask in differentiate(function, value):
        with pytest.raises(ValueError, match=name):
            ask()
    if name != "p":  # which is refused as any tensor
        function(torch.as_tensor(value, dtype=torch.float64))


def test_what_cannot_be_transformed_says_so():
    x = draw(3, 4)
    message = "accumulate_moments cannot be differentiated, nor transformed by torch.func"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda g: ops.accumulate_moments([g], None), (x,), (x,))
    with pytest.raises(NotImplementedError, match=message):
        torch.vmap(lambda g: ops.accumulate_moments([g], None, zero_grads=True))(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        ops.accumulate_moments([x], [forward_ad.make_dual(x.clone(), x)])
    stats = ops.norm_mish(x, x[0], x[0], x[0]).new_ones(3, 2)
    backward = lambda g: torch.ops.ttcfast.norm_mish_backward(g, x, None, x[0], x[0], x[0], 1e-5, stats, False, "auto")[0]  # noqa: E731
    with pytest.raises(NotImplementedError, match="norm_mish_backward cannot be differentiated"):
        torch.func.jvp(backward, (x,), (x,))
    with pytest.raises(NotImplementedError, match="norm_mish_backward cannot be differentiated"):
        backward(x.clone().requires_grad_()).sum().backward()


def test_a_backend_asked_for_by_name_is_refused():
    x = draw(3, 4)
    assert torch.vmap(lambda z: ops.heun_predict(z, z, 0.1, backend="reference"))(x).shape == x.shape
    with pytest.raises(ops.BackendError, match=r"heun_predict: backend 'cpu' cannot run under torch.func"):
        torch.vmap(lambda z: ops.heun_predict(z, z, 0.1, backend="cpu"))(x)


def test_transforms_within_autocast_keep_its_precision():
    x, layer = torch.randn(3, 8), [torch.randn(8) for _ in range(3)]
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            value, along = torch.func.jvp(lambda x: ops.norm_mish(x, *layer), (x.to(dtype),), (torch.ones(3, 8, dtype=dtype),))
            assert value.dtype == along.dtype == dtype
            torch.testing.assert_close(value, ops.norm_mish(x.to(dtype), *layer))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])  # inductor loses the tangents of torch's own functions (pytorch#187284)
def test_dual_numbers_through_compiled_code_keep_their_tangents(backend):
    """Also where torch.compile, having met a transform, leaves the caller eager and compiles what it calls."""
    torch._dynamo.reset()
    run = torch.compile(lambda z: ops.heun_predict(z, z.sin(), 0.3), backend=backend)
    x, tangent = draw(2, 4), draw(2, 4)
    expected = tangent * (1 + 0.3 * x.cos())
    for _ in range(2):
        with forward_ad.dual_level():
            close(forward_ad.unpack_dual(run(forward_ad.make_dual(x, tangent))).tangent, expected)
        close(torch.func.jvp(run, (x,), (tangent,))[1], expected)
