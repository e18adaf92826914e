"""``ops.arm`` for declared fields: the definition in closed form, and every backend against it."""

import math
from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ttcfast import ops
from ttcfast.ops import native, registry
from ttcfast.ops.arm_fields import flatten_fields
from ttcfast.spec import ARMWeights, FieldSpec, StateSpec

PERIODIC = (True, (True, False, False), False)


def problem(ndim=2, n=2, b=5, side=11, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(n, 4, *[side] * ndim, generator=generator)
    return state.to(dtype), (state.unsqueeze(1) + 0.3 * torch.randn(n, b, 4, *[side] * ndim, generator=generator)).to(dtype)


PLAIN = StateSpec.fields("h", "u", "v", "tracer")


def full_spec(ndim, side, *, fields=True, periodic=True):
    velocity = ("u", "v", "w")[:ndim] if ndim > 1 else ()
    generator = torch.Generator().manual_seed(1)
    more = {}
    if fields:
        mask = torch.rand([side] * ndim, generator=generator) < 0.2
        more = {"cell_volume": torch.rand([side] * ndim, generator=generator) + 0.5, "boundary_mask": mask}
        more["boundary_value"] = torch.randn(4, *[1] * ndim, generator=generator)
    names = ("h", "u", "v", "w") if ndim == 3 else ("h", "u", "v", "tracer")
    conserved = {"mass": "h", **({"momentum": velocity} if velocity else {"momentum": ("u", "v")})}
    mean = () if ndim == 3 else ("tracer",)
    return StateSpec.fields(
        *names,
        ndim=ndim,
        periodic=periodic,
        conserved=conserved,
        bounds={"h": (-0.5, 0.8), "u": (None, 0.1)},
        divergence_free=velocity,
        mean_zero=mean,
        spacing=[0.5, 0.25, 2.0][:ndim],
        **more,
    )


def on_device(state, candidates, spec, device, **options):
    """Scores by tensors on the device, brought back."""
    found = ops.arm(state.to(device), candidates.to(device), spec.to(torch.device(device)), **options)
    terms = {name: value.cpu() for name, value in found.terms.items()}
    return type(found)(*(terms if isinstance(x, dict) else x.cpu() for x in found))


def test_the_penalties_are_what_they_say():
    spec = StateSpec.fields("h", "hu", "hv", conserved={"mass": "h", "momentum": ("hu", "hv")}, bounds={"h": (0, 2)}, cell_volume=0.25)
    state = torch.ones(1, 3, 4, 4)
    one, two, three = (state.clone() for _ in range(3))
    one[:, 0, 0, 0] += 0.5  # mass 0.125 of 4
    two[:, 1, 1, 1] += 3.0  # momentum (0.75, -0.5)
    two[:, 2, 2, 2] -= 2.0
    three[:, 0, 0, :2] = torch.tensor([-1.0, 4.0])  # 1 below and 2 above, of 16 cells
    candidates = torch.stack([state, one, two, three], 1)
    found = ops.arm(state, candidates, spec, momentum="norm")
    assert list(found.terms) == ["mass", "momentum", "boundary", "bounds", "divergence"]
    torch.testing.assert_close(found.terms["mass"], torch.tensor([[0.0, 0.125, 0.0, 0.25]]))
    torch.testing.assert_close(found.terms["momentum"], torch.tensor([[0.0, 0.0, math.hypot(0.75, 0.5), 0.0]]))
    torch.testing.assert_close(found.terms["bounds"], torch.tensor([[0.0, 0.0, 0.0, 3 / 16]]))
    relative = ops.arm(state, candidates, spec, momentum="norm", scale="relative")
    torch.testing.assert_close(relative.terms["mass"], found.terms["mass"] / 4)
    torch.testing.assert_close(relative.terms["momentum"], found.terms["momentum"] / (4 * math.sqrt(2)))
    torch.testing.assert_close(found.score, -(found.terms["mass"] + found.terms["momentum"] + 0.1 * found.terms["bounds"]))
    weighted = ops.arm(state, candidates, spec, {"momentum": 0.0, "bounds": 2.0}, momentum="norm")
    torch.testing.assert_close(weighted.score, -(found.terms["mass"] + 2 * found.terms["bounds"]))


def test_a_field_without_divergence_has_none_and_a_source_has_its_own():
    n = 64
    x = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    x, y = torch.meshgrid(x, x, indexing="ij")
    spec = StateSpec.fields("u", "v", divergence_free=("u", "v"), spacing=[2 * math.pi / n] * 2)
    swirl = torch.stack([x.cos() * y.sin(), -x.sin() * y.cos()])[None]
    source = torch.stack([x.sin(), torch.zeros_like(y)])[None]
    found = ops.arm(swirl, torch.stack([swirl, source], 1), spec)
    assert float(found.terms["divergence"][0, 0]) < 1e-14
    assert float(found.terms["divergence"][0, 1]) == pytest.approx(2 / math.pi, rel=5e-3)  # the mean of abs(cos x)
    relative = ops.arm(source, torch.stack([swirl, source], 1), spec, scale="relative")
    torch.testing.assert_close(relative.terms["divergence"], torch.tensor([[0.0, 1.0]], dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_state_that_has_none_of_a_quantity_and_no_slopes_is_measured_per_volume(backend, device):
    """At rest, or before a dye is let in, there is nothing to be relative to."""
    spec = StateSpec.fields("u", "v", "dye", conserved={"momentum": ("u", "v"), "dye": "dye"}, divergence_free=("u", "v"), cell_volume=0.25)
    state = torch.zeros(3, 3, 8, 8)
    state[1, 0] = 2.0  # a uniform flow
    state[2] = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    state[2, 2] -= state[2, 2].mean()  # of total 0, yet not without magnitude
    candidates = state.unsqueeze(1) + 0.01 * torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"momentum": "components", "backend": backend}
    found, plain = (on_device(state, candidates, spec, device, scale=scale, **options).terms for scale in ("relative", "absolute"))
    volume = 0.25 * 64
    torch.testing.assert_close(found["dye"][:2], plain["dye"][:2] / volume)
    units = torch.tensor([volume, 2.0 * volume, 0.25 * float(state[2, :2].norm(dim=0).sum())])
    torch.testing.assert_close(found["momentum"], plain["momentum"] / units.unsqueeze(1))
    torch.testing.assert_close(found["divergence"][:2], plain["divergence"][:2])
    torch.testing.assert_close(found["dye"][2], plain["dye"][2] / (0.25 * state[2, 2].abs().sum()))
    assert all(float(value.max()) < 1 for value in found.values())


def test_a_mean_of_zero_is_scored_by_itself_and_expected_changes_are_taken_off():
    spec = StateSpec.fields("q", "p", conserved="q", mean_zero="p", cell_volume=0.5)
    state = torch.zeros(2, 2, 4, 4)
    candidates = state.unsqueeze(1) + torch.tensor([1.0, -0.5]).reshape(1, 1, 2, 1, 1)
    found = ops.arm(state, candidates, spec)
    torch.testing.assert_close(found.terms["q"], torch.full((2, 1), 8.0))
    torch.testing.assert_close(found.terms["mean"], torch.full((2, 1), 4.0))
    expected = ops.arm(state, candidates, spec, expected={"q": torch.tensor([8.0, 6.0])})
    torch.testing.assert_close(expected.terms["q"], torch.tensor([[0.0], [2.0]]))


@pytest.mark.parametrize("periodic", [True, False])
def test_a_gas_expects_changes_too(backend, device, periodic):
    spec = StateSpec.euler2d(cell_volume=0.1, periodic=periodic)
    state = torch.rand(2, 4, 5, 5) + torch.tensor([1.0, 0, 0, 3]).reshape(4, 1, 1)
    drift = torch.tensor([0.2, 0.1, -0.3, 0.5]).reshape(4, 1, 1)
    candidates = (state + drift).unsqueeze(1)
    budget = {"mass": 0.5, "momentum": torch.tensor([[0.25, -0.75]]).expand(2, 2), "energy": torch.tensor([1.25, 1.0])}
    found = on_device(state, candidates, spec, device, momentum="components", expected=budget, backend=backend)
    torch.testing.assert_close(found.mass, torch.zeros(2, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.momentum, torch.zeros(2, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.energy, torch.tensor([[0.0], [0.25]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("fields", [True, False])
@pytest.mark.parametrize("scale", ["absolute", "relative"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_backend_agrees_with_the_definition(backend, device, dtype, ndim, scale, fields):
    side = {1: 37, 2: 11, 3: 5}[ndim]
    periodic = PERIODIC[ndim - 1] if fields else True
    periodic = periodic[:ndim] if isinstance(periodic, tuple) else periodic
    state, candidates = problem(ndim, side=side, dtype=dtype)
    spec = full_spec(ndim, side, fields=fields, periodic=periodic)
    interpreted = backend == "triton" and device == "cpu"
    for momentum in ("norm",) if interpreted else ("sum", "components", "norm"):
        options = {"momentum": momentum, "scale": scale, "expected": {"momentum": 0.3}}
        truth = ops.arm(state.double(), candidates.double(), spec, **options, backend="reference")
        found = on_device(state, candidates, spec, device, **options, backend=backend)
        close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
        assert found.score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for name, value in truth.terms.items():
            torch.testing.assert_close(found.terms[name].double(), value, **close, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(found.score.double(), truth.score, **close)


def test_what_is_not_finite_scores_least(backend, device):
    state, candidates = problem()
    candidates[0, 1, 3, 2, 2], candidates[0, 2, 0, 0, 0], candidates[1, 0, 1, 10, 10] = math.nan, math.inf, -math.inf
    found = on_device(state, candidates, full_spec(2, 11), device, backend=backend)
    bad = torch.zeros(2, 5, dtype=torch.bool)
    bad[0, 1] = bad[0, 2] = bad[1, 0] = True
    assert torch.equal(found.finite, ~bad)
    assert torch.equal(found.score.isneginf(), bad)
    for value in found.terms.values():
        assert torch.equal(value.isposinf(), bad)


@pytest.mark.skipif(native.available() is not None, reason="no extension")
def test_bits_depend_on_neither_threads_nor_levels_nor_company(monkeypatch):
    state, candidates = problem(n=3, b=7, side=150)
    spec = full_spec(2, 150)
    whole = ops.arm(state, candidates, spec, scale="relative", backend="cpu")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for level in range(len(native.module().cpu_levels)):
                monkeypatch.setattr(native, "highest_level", level)
                found = ops.arm(state[1:2], candidates[1:2, 2:4], spec, scale="relative", backend="cpu")
                assert torch.equal(found.score, whole.score[1:2, 2:4])
                for name, value in found.terms.items():
                    assert torch.equal(value, whole.terms[name][1:2, 2:4]), name
    finally:
        torch.set_num_threads(before)
    strided = candidates.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(ops.arm(state, strided, spec, scale="relative", backend="cpu").score, whole.score)


def test_derivatives_are_those_of_the_definition():
    state, candidates = problem(side=5, dtype=torch.float64)
    spec = full_spec(2, 5, periodic=False)
    candidates[0, 1, 0, 0, 0] = math.nan
    candidates.requires_grad_()
    found = ops.arm(state, candidates, spec, momentum="norm", scale="relative")
    found.score.masked_fill(~found.finite, 0.0).sum().backward()
    grad = candidates.grad
    assert grad.isfinite().all() and not grad[0, 1].any()
    good = candidates.detach()[:, 2:3].requires_grad_()
    assert torch.autograd.gradcheck(lambda c: ops.arm(state, c, spec, momentum="norm", scale="relative").score, (good,))
    along = torch.func.jvp(lambda c: ops.arm(state, c, spec).score, (good.detach(),), (torch.ones_like(good),))[1]
    assert along.isfinite().all()


@pytest.mark.parametrize("fields", [True, False])
def test_opcheck(backend, device, fields):
    state, candidates = problem(side=5)
    spec = full_spec(2, 5, fields=fields).to(torch.device(device))
    call = flatten_fields(state.to(device), candidates.to(device).requires_grad_(), spec, None, "norm", "relative", None)
    registered = ("test_schema", "test_autograd_registration", "test_faketensor")  # the fourth, tracing, is dear
    torch.library.opcheck(torch.ops.ttcfast.arm_fields.default, (*call, backend), test_utils=registered)
    if backend == "reference" and fields:
        torch.library.opcheck(torch.ops.ttcfast.arm_fields.default, (*call, backend))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend, device, compiler):
    state, candidates = (x.to(device) for x in problem(side=6))
    spec = full_spec(2, 6).to(torch.device(device))
    assert torch.is_tensor(spec.cell_volume) and StateSpec.fields("u", cell_volume=spec.cell_volume).distances[0] > 0

    def best(s, c):
        found = ops.arm(s, c, spec, scale="relative", expected={"mass": 0.1}, backend=backend)
        return found.score.argmax(1), found.score

    torch._dynamo.reset()  # the other backends' graphs of `best` count against its recompile limit
    compiled = torch.compile(best, fullgraph=True, backend=compiler)
    assert all(torch.equal(x, y) for x, y in zip(compiled(state, candidates), best(state, candidates)))
    grads = []
    for f in (best, compiled):
        c = candidates.clone().requires_grad_()
        f(state, c)[1].sum().backward()
        grads.append(c.grad)
    torch.testing.assert_close(grads[0], grads[1])


class Asks(TorchDispatchMode):
    """Notes operations that wait for a device: values read, sizes that depend on data, lists of the host made into indices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_nothing_is_asked_of_the_device(backend, device, scale):
    state, candidates = (x.to(device) for x in problem(side=6))
    spec = full_spec(2, 6).to(torch.device(device))
    rate = torch.ones(len(state), device=device)
    with Asks():
        ops.arm(state, candidates, spec, scale=scale, expected={"mass": rate, "momentum": 0.5}, backend=backend)


def test_triton_finishes_in_one_launch_or_two_whatever_program_is_last(monkeypatch):
    """Two tiles of each of ten candidates, in an order that the interpreter would not choose."""
    if (reason := registry.triton_available()) is not None:
        pytest.skip(reason)
    kernels, device = import_module("ttcfast.kernels.arm_fields"), "cpu" if registry.interpreting() else "cuda"
    state, candidates = (x.to(device) for x in problem(side=15))
    spec = full_spec(2, 15).to(torch.device(device))

    def score():
        return ops.arm(state, candidates, spec, scale="relative", backend="triton")

    def same(x, y):
        return torch.equal(x.score, y.score) and all(torch.equal(x.terms[name], y.terms[name]) for name in x.terms)

    expected = score()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "MOST_FOLDED", 0)
        assert same(score(), expected)
    if registry.interpreting():
        from triton.runtime.interpreter import interpreter_builder

        place, programs = interpreter_builder.set_grid_idx, 2 * candidates.shape[0] * candidates.shape[1]
        for order in (torch.randperm(programs).tolist(), list(reversed(range(programs)))):
            monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z, order=order: place(order[x], y, z))
            assert same(score(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_a_cuda_graph_replays_with_new_candidates():
    state, candidates = (x.cuda() for x in problem(side=16))
    spec = full_spec(2, 16).to(torch.device("cuda"))

    def score():
        return ops.arm(state, candidates, spec, scale="relative", backend="triton").score

    score()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = score()
    candidates.copy_(problem(side=16, seed=3)[1])
    graph.replay()
    assert torch.equal(held, score())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s, c: ops.arm(s, c, PLAIN, {"mass": 1.0}), "weights names 'mass', which is no penalty; the penalties are boundary"),
        (lambda s, c: ops.arm(s, c, StateSpec(), {"bounds": 1.0}), "weights names 'bounds', .*the penalties are mass, momentum, energy"),
        (lambda s, c: ops.arm(s, c, PLAIN, {"bounds": -1.0}), "the weight of 'bounds' is -1.0"),
        (
            lambda s, c: ops.arm(s, c, PLAIN, expected={"mass": 1.0}),
            "expected names 'mass', which is no conserved quantity; they are none",
        ),
        (
            lambda s, c: ops.arm(s, c, full_spec(2, 11), expected={"momentum": torch.ones(2)}),
            r"expected change of 'momentum' has shape \(2,\); give a number or \[2, 2\]",
        ),
        (lambda s, c: ops.arm(s[:, :3], c[:, :, :3], PLAIN), "state has 3 channels"),
    ],
)
def test_wrong_arguments_are_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(*problem())


def test_a_gas_takes_weights_by_name_and_a_field_those_of_a_gas():
    state, candidates = torch.rand(1, 4, 4, 4) + 1, torch.rand(1, 2, 4, 4, 4) + 1
    named = ops.arm(state, candidates, StateSpec(), {"mass": 0.5, "positivity": 3.0})
    assert torch.equal(named.score, ops.arm(state, candidates, StateSpec(), ARMWeights(w_mass=0.5, w_positivity=3.0)).score)
    spec = StateSpec.fields("rho", "m", "n", "e", conserved={"mass": "rho"}, bounds={"rho": (3, None)})
    assert isinstance(spec, FieldSpec)
    found = ops.arm(state, candidates, spec, ARMWeights(w_mass=0.5, w_positivity=3.0))
    torch.testing.assert_close(found.score, -(0.5 * found.terms["mass"] + 3 * found.terms["bounds"]))
    assert named.terms["mass"] is named.mass
