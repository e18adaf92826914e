"""ops.mlp_flow: the fused loop against the plain one in every mode, and what it must not do."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.tolerances import ACTIVATIONS, assert_within
from ttcfast.ops import VelocityMLP, mlp_flow
from ttcfast.ops.mlp_flow import mlp_flow_ref
from ttcfast.ops.mlp_flow_loop import FROZEN, NOTHING, TRAINED

METHODS = ("heun", "euler")


class Problem:
    """A velocity of two hidden layers of unlike widths, whose first product is a part of a wider matrix, as in the model."""

    def __init__(
        self, dtype: torch.dtype, device: str, b: int = 5, d: int = 8, widths: tuple[int, ...] = (12, 7), substeps: int = 3
    ) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64)

        sizes = [d, *widths, d]
        self.wide = [draw(widths[0], d + 3) / d**0.5, *(draw(o, i) / i**0.5 for i, o in itertools.pairwise(sizes[1:]))]
        self.rest = [[draw(w) for w in (*widths[1:], d)], [1 + 0.3 * draw(w) for w in widths], [0.3 * draw(w) for w in widths]]
        self.z, self.rows, self.times = draw(b, d).softmax(-1), draw(b, widths[0]), draw(substeps + 1, widths[0])
        self.dtype, self.device, self.substeps = dtype, device, substeps

    def to(
        self, dtype: torch.dtype, device: str, method: str, trained: bool = False, frozen: bool = False
    ) -> tuple[list[Tensor], VelocityMLP]:
        """z, rows and times, and the network; leaves that require gradients as asked."""
        convert = lambda t, grad: t.to(dtype).to(device).requires_grad_(grad)  # noqa: E731
        state = [convert(t.clone(), trained or frozen) for t in (self.z, self.rows)]
        times = convert(self.times[: self.substeps + (method == "heun")].clone(), trained)
        first, *others = (convert(w.clone(), trained) for w in self.wide)
        parts = [[convert(t.clone(), trained) for t in part] for part in self.rest]
        self.leaves = [*state, times, first, *others, *itertools.chain(*parts)]
        return [*state, times], VelocityMLP([first[:, : self.z.shape[1]], *others], *parts)

    def ours(self, method: str, backend: str, **options) -> Tensor:
        mode = {k: options.pop(k, False) for k in ("trained", "frozen")}
        state, network = self.to(self.dtype, self.device, method, **mode)
        return mlp_flow(*state, network, method=method, substeps=self.substeps, backend=backend, **options)

    def plain(self, method: str, group: int, **mode) -> Tensor:
        state, network = self.to(torch.float64, "cpu", method, **mode)
        return mlp_flow_ref(*state, network, method, self.substeps, group, 1e-5)


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_with_the_plain_loop(backend, device, dtype, method, group):
    problem = Problem(dtype, device)
    expected = problem.plain(method, group)
    for mode in ({}, {"frozen": True}, {"trained": True}):
        found = problem.ours(method, backend, group=group, **mode)
        assert found.dtype == dtype
        assert_within(found, expected, ACTIVATIONS[dtype], 20.0, str(mode))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["trained", "frozen"])
@pytest.mark.parametrize("group", [0, 4])
def test_gradients_are_autograds_to_rounding_in_float64(backend, device, method, mode, group):
    problem = Problem(torch.float64, device)
    weight = torch.randn_like(problem.z)
    (problem.plain(method, group, **{mode: True}) * weight).sum().backward()
    expected = [t.grad for t in problem.leaves]
    (problem.ours(method, backend, group=group, **{mode: True}) * weight.to(device)).sum().backward()
    found = [t.grad for t in problem.leaves]
    assert [g is None for g in expected[3:]] == [mode == "frozen"] * len(expected[3:])
    for f, e in zip(found, expected):
        assert (f is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(f.cpu(), e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mode", ["trained", "frozen"])
def test_gradcheck(backend, device, mode):
    problem = Problem(torch.float64, device, b=2, widths=(5, 4), substeps=2)
    state, network = problem.to(torch.float64, device, "heun", **{mode: True})
    leaves = [*state, *itertools.chain(*network)] if mode == "trained" else state[:2]

    def run(*tensors: Tensor) -> Tensor:
        if mode == "frozen":
            return mlp_flow(*tensors, state[2], network, group=4, backend=backend)
        z, rows, times, *flat = tensors
        parts = [flat[:3], flat[3:5], flat[5:7], flat[7:9]]
        return mlp_flow(z, rows, times, VelocityMLP(*parts), group=4, backend=backend)

    # One random direction per input where every call is interpreted; the test above compares each entry.
    assert torch.autograd.gradcheck(run, [t.detach().requires_grad_() for t in leaves], fast_mode=backend == "triton")


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_products_keep_a_float32_state(backend, device, method):
    if backend == "cpu":
        return  # refused: see below
    problem = Problem(torch.float32, device)
    expected = problem.plain(method, 4, trained=True)
    expected.square().sum().backward()
    wanted = [t.grad for t in problem.leaves]
    found = problem.ours(method, backend, group=4, trained=True, matmul_dtype=torch.bfloat16)
    found.square().sum().backward()
    assert found.dtype == torch.float32
    # bfloat16 keeps 8 bits: a velocity of size 1 to 3 is off by a hundredth, the state less.
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0.03, atol=0.03)
    sums = found.unflatten(-1, (-1, 4)).sum(-1).double().cpu() - problem.z.unflatten(-1, (-1, 4)).sum(-1)
    assert sums.abs().max() < 1e-6
    for leaf, e in zip(problem.leaves, wanted):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad.double().cpu() - e).norm() < 0.05 * e.norm() + 0.02


def products(run) -> int:
    """How many matrix products ``run`` makes."""
    with torch.profiler.profile() as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::bmm", "aten::baddbmm"))


@pytest.mark.parametrize(("method", "evaluations"), [("heun", 6), ("euler", 3)])
def test_frozen_dynamics_form_no_weight_gradient_and_trained_ones_form_each_once(method, evaluations):
    problem = Problem(torch.float32, "cpu")
    layers = len(problem.wide)
    for mode, extra in (("frozen", 0), ("trained", layers)):
        found = problem.ours(method, "reference", **{mode: True})
        assert products(lambda: problem.ours(method, "reference")) == layers * evaluations
        assert products(lambda found=found: found.sum().backward()) == layers * evaluations + extra


def test_nothing_is_kept_without_gradients():
    problem = Problem(torch.float32, "cpu")
    state, network = problem.to(torch.float32, "cpu", "heun", trained=True)
    with torch.no_grad():
        assert mlp_flow(*state, network, substeps=3).grad_fn is None
        sizes = [
            sum(t.numel() for t in torch.ops.ttcfast.mlp_flow(*state, *network, "heun", 3, 0, 1e-5, False, keep, "auto")[1])
            for keep in (NOTHING, FROZEN, TRAINED)
        ]
    rows, evaluations = 5, 6
    hidden, stats, inputs = 12 + 7, 2 + 2, 8
    assert sizes == [0, evaluations * rows * (hidden + stats), evaluations * rows * (hidden + stats + inputs)]


def test_rows_do_not_depend_on_their_company(backend, device):
    problem = Problem(torch.float64, device, b=9)
    (z, rows, times), network = problem.to(torch.float64, device, "heun")
    whole = mlp_flow(z, rows, times, network, substeps=3, backend=backend)
    part = mlp_flow(z[2:5], rows[2:5], times, network, substeps=3, backend=backend)
    torch.testing.assert_close(whole[2:5], part, rtol=1e-13, atol=1e-14)


def test_an_empty_batch_stays_empty(backend, device):
    problem = Problem(torch.float32, device, b=0)
    found = problem.ours("heun", backend, trained=True)
    found.sum().backward()
    assert found.shape == (0, 8)
    assert all(bool((t.grad == 0).all()) for t in problem.leaves)


@pytest.mark.parametrize("mode", ["trained", "frozen"])
@pytest.mark.parametrize("method", METHODS)
def test_opcheck(backend, device, method, mode):
    problem = Problem(torch.float32, device)
    state, network = problem.to(torch.float32, device, method, **{mode: True})
    rest = (method, 3, 4, 1e-5, False, TRAINED if mode == "trained" else FROZEN)
    torch.library.opcheck(torch.ops.ttcfast.mlp_flow.default, (*state, *network, *rest, backend))
    detached = [t.detach() for t in state], [[t.detach() for t in part] for part in network]
    z, kept = torch.ops.ttcfast.mlp_flow(*detached[0], *detached[1], *rest, backend)
    arguments = (torch.ones_like(z), *detached[0], *detached[1], *rest, kept, backend)
    torch.library.opcheck(torch.ops.ttcfast.mlp_flow_backward.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_as_one_graph(backend, device):
    problem = Problem(torch.float32, device)
    state, network = problem.to(torch.float32, device, "heun", trained=True)
    torch._dynamo.reset()

    def run(z: Tensor) -> Tensor:
        return mlp_flow(z, *state[1:], network, substeps=3, group=4, backend=backend).square().sum()

    grads = [torch.autograd.grad(f(state[0]), problem.leaves) for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager"))]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_differentiable_twice():
    problem, seconds = Problem(torch.float64, "cpu", b=2, widths=(5, 4), substeps=2), []
    for run in (lambda: problem.ours("heun", "auto", group=4, trained=True), lambda: problem.plain("heun", 4, trained=True)):
        found = run()
        first = torch.autograd.grad(found.square().sum(), problem.leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), problem.leaves))
    for found, expected in zip(*seconds):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def broken(**changes) -> None:
    """The call of a small problem with one argument replaced."""
    problem = Problem(torch.float32, "cpu")
    (z, rows, times), network = problem.to(torch.float32, "cpu", "heun")
    given = {"z": z, "rows": rows, "times": times, **network._asdict(), **{k: v for k, v in changes.items() if k not in OPTIONS}}
    options = {"substeps": 3, **{k: v for k, v in changes.items() if k in OPTIONS}}
    parts = VelocityMLP(*(given[name] for name in VelocityMLP._fields))
    mlp_flow(given["z"], given["rows"], given["times"], parts, **options)


OPTIONS = ("method", "substeps", "group", "matmul_dtype", "backend", "eps")


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"z is torch.float32 \(8,\); give \[B, D\]", {"z": torch.ones(8)}),
        ("z is torch.float16", {"z": torch.ones(5, 8).half()}),
        (r"rows is torch.float32 \(5, 7\).* must be torch.float32 \(5, 12\)", {"rows": torch.ones(5, 7)}),
        (r"times is torch.float32 \(3, 12\).* must be torch.float32 \(4, 12\)", {"times": torch.ones(3, 12)}),
        (r"weights\[1\] is torch.float32 \(7, 3\)", {"weights": [torch.ones(12, 8), torch.ones(7, 3), torch.ones(8, 7)]}),
        (r"biases\[0\] is torch.float64", {"biases": [torch.ones(7).double(), torch.ones(8)]}),
        (r"scales\[1\] is torch.float32 \(7,\) on meta", {"scales": [torch.ones(12), torch.ones(7, device="meta")]}),
        ("the network has 3 weights, 2 biases, 2 scales, 1 shifts", {"shifts": [torch.ones(12)]}),
        ("substeps is 0; it must be at least 1", {"substeps": 0}),
        ("method is 'rk4'; it must be one of 'heun', 'euler'", {"method": "rk4"}),
        ("group is 3, which does not divide", {"group": 3}),
        ("matmul_dtype is torch.float16 and z torch.float32", {"matmul_dtype": torch.float16}),
        ("the C\\+\\+ path takes float32 or float64", {"matmul_dtype": torch.bfloat16, "backend": "cpu"}),
        ("rows has strides", {"rows": torch.ones(12, 5).t(), "backend": "cpu"}),
    ],
)
def test_wrong_input_gives_one_clear_line(message, changes):
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        broken(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("mode", ["", "frozen", "trained"])
def test_the_loop_and_its_backward_are_captured_as_one_graph(mode):
    problem = Problem(torch.float32, "cuda", b=64, d=64, widths=(128, 128), substeps=4)
    state, network = problem.to(torch.float32, "cuda", "heun", **({mode: True} if mode else {}))
    leaves = [t for t in problem.leaves if t.requires_grad]

    def run() -> list[Tensor]:
        found = mlp_flow(*state, network, substeps=4, group=8)
        return [found, *(torch.autograd.grad(found.square().sum(), leaves) if leaves else ())]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
