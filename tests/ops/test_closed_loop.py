"""ops.closed_loop: the C++ loop against the loop over operations, in values and gradients, and what it refuses."""

from __future__ import annotations

import contextlib
import itertools
import sys

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from ttcfast.ops import MLP, VelocityMLP, closed_loop, mlp_flow, native
from ttcfast.ops.closed_loop import closed_loop_ref

module = sys.modules["ttcfast.ops.closed_loop"]
pytestmark = pytest.mark.skipif(native.available() is not None, reason="the C++ loop needs the compiled extension")


def network(sizes: tuple[int, ...], sets: tuple[int, ...], seed: int) -> list[list[Tensor]]:
    draws = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*sets, *shape, generator=draws, dtype=torch.float64)

    hidden = sizes[1:-1]
    weights = [draw(o, i) / i**0.5 for i, o in itertools.pairwise(sizes)]
    return [weights, [0.3 * draw(o) for o in sizes[1:]], [1 + 0.3 * draw(u) for u in hidden], [0.3 * draw(u) for u in hidden]]


class Problem:
    """A policy of two hidden layers and dynamics of two whose first weight is part of a wider one, as in a world model."""

    def __init__(self, method: str = "heun", substeps: int = 2, sets: tuple[int, ...] = (), b: int = 70, t: int = 3) -> None:
        d, a, k = 6, 2, {"heun": substeps + 1, "euler": substeps, "map": 1}[method]
        wide, biases, scales, shifts = network((d + a, 9, 12, d), sets, 0)
        self.options = {"method": method, "substeps": substeps, "group": 0 if method == "map" else 3}
        self.flow = [wide[0], wide[1], wide[2], *biases[1:], *scales, *shifts]
        self.times = biases[0].unsqueeze(-2) * torch.ones(k, 1, dtype=torch.float64)
        self.policy = [t for part in network((d, 7, 5, a), sets, 1) for t in part]
        draws = torch.Generator().manual_seed(2)
        self.z = torch.randn(*sets, b, d, generator=draws, dtype=torch.float64)
        self.offsets = torch.randn(t, *sets, b, a, generator=draws, dtype=torch.float64)

    def run(self, detach: bool, ref: bool = False, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
        """The results, and the gradients of z, offsets and the policy's parameters."""
        z, offsets, *policy = (t.to(dtype).requires_grad_() for t in (self.z, self.offsets, *self.policy))
        wide, *flow = (t.to(dtype) for t in self.flow)
        weight_z, weight_a = wide.split([6, 2], -1)
        parts = MLP(policy[:3], policy[3:6], policy[6:8], policy[8:]), VelocityMLP([weight_z, *flow[:2]], flow[2:4], flow[4:6], flow[6:])
        given = (z, offsets, parts[0], weight_a, self.times.to(dtype), parts[1])
        if ref:
            results = closed_loop_ref(*given, (*self.options.values(), 1e-5), 1e-5, detach)
        else:
            results = closed_loop(*given, **self.options, detach=detach)
        loss = sum((r * torch.linspace(-1, 1, r.numel(), dtype=dtype).reshape(r.shape)).sum() for r in results) + results[1].sum()
        return list(results), list(torch.autograd.grad(loss, [z, offsets, *policy]))


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("sets", [(), (3,)])
@pytest.mark.parametrize(("method", "substeps"), [("heun", 2), ("euler", 1), ("euler", 3), ("map", 1)])
def test_agrees_with_the_loop_over_operations(method, substeps, sets, detach):
    problem = Problem(method, substeps, sets)
    for found, expected in zip(problem.run(detach), problem.run(detach, ref=True)):
        for f, e in zip(found, expected):
            torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)


def test_one_call_does_it_all(monkeypatch):
    def loop(*_):
        raise AssertionError("the loop over operations")

    monkeypatch.setattr(module, "closed_loop_ref", loop)
    Problem().run(False)


@pytest.mark.parametrize("at", ["offsets", "z"])
def test_strided_arguments_and_gradients(at):
    problem = Problem()
    expected = problem.run(False)
    setattr(problem, at, getattr(problem, at).transpose(-1, -2).contiguous().transpose(-1, -2))
    for found, wanted in zip(problem.run(False), expected):
        for f, w in zip(found, wanted):
            assert torch.equal(f, w)
    z, offsets, *policy = (t.clone().requires_grad_() for t in (problem.z, problem.offsets, *problem.policy))
    wide, *flow = problem.flow
    parts = MLP(policy[:3], policy[3:6], policy[6:8], policy[8:]), VelocityMLP([wide[:, :6], *flow[:2]], flow[2:4], flow[4:6], flow[6:])
    sums = []
    for run in (closed_loop, lambda *a, **k: closed_loop_ref(*a, ("heun", 2, 3, 1e-5), 1e-5, False)):
        _, actions = run(z, offsets, parts[0], wide[:, 6:], problem.times, parts[1], **problem.options)
        sums.append(torch.autograd.grad(actions.sum(), policy))  # the gradient of a sum is one number with strides of 0
    for f, e in zip(*sums):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)


def test_float32_is_close_to_float64():
    problem = Problem()
    for found, expected in zip(problem.run(False, dtype=torch.float32), problem.run(False)):
        for f, e in zip(found, expected):
            torch.testing.assert_close(f.double(), e, rtol=1e-3, atol=1e-3 * float(e.detach().abs().max()))


def test_each_set_is_its_own_loop_bit_for_bit():
    whole = Problem(sets=(3,))
    results, _ = whole.run(False, dtype=torch.float32)
    for i in range(3):
        one = Problem()
        for name in ("flow", "policy"):
            setattr(one, name, [t[i] for t in getattr(whole, name)])
        one.z, one.offsets, one.times = whole.z[i], whole.offsets[:, i], whole.times[i]
        for together, alone in zip(results, one.run(False, dtype=torch.float32)[0]):
            assert torch.equal(together[:, i], alone)


def test_threads_and_instruction_sets_change_no_bit(monkeypatch):
    problem = Problem(b=200, t=12)  # enough arithmetic for threads

    def run() -> list[Tensor]:
        return [t for part in problem.run(False, dtype=torch.float32) for t in part]

    expected, before = run(), torch.get_num_threads()
    try:
        for level in range(len(native.module().cpu_levels)):
            monkeypatch.setattr(native, "highest_level", level)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert all(torch.equal(a, b) for a, b in zip(run(), expected))
    finally:
        torch.set_num_threads(before)


def test_is_differentiable_twice():
    problem = Problem(b=2, t=2)
    policy = [t.clone().requires_grad_() for t in problem.policy]

    def second(ref: bool) -> list[Tensor]:
        wide, *flow = problem.flow
        weight_z, weight_a = wide.split([6, 2], -1)
        parts = MLP(policy[:3], policy[3:6], policy[6:8], policy[8:]), VelocityMLP([weight_z, *flow[:2]], flow[2:4], flow[4:6], flow[6:])
        given = (problem.z, problem.offsets, parts[0], weight_a, problem.times, parts[1])
        found = closed_loop_ref(*given, ("heun", 2, 3, 1e-5), 1e-5, False) if ref else closed_loop(*given, **problem.options)
        first = torch.autograd.grad(found[0].square().sum(), policy, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), policy))

    for found, expected in zip(second(False), second(True)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


class Elsewhere(torch.autograd.graph.saved_tensors_hooks):
    """Saved tensors are copies, and what they are copied from is lost, as with save_on_cpu."""

    def __init__(self) -> None:
        super().__init__(lambda t: t.detach().clone(), lambda t: t.clone())


@pytest.mark.parametrize("how", ["hooks", "checkpoint", "data"])
def test_the_backward_pass_reads_its_tensors_where_they_are(how):
    """Copies of saved tensors, tensors computed again, and parameters whose memory was exchanged: none of the first addresses holds."""
    problem = Problem(b=30, t=2)
    wide, *flow = problem.flow
    dynamics = VelocityMLP([wide[:, :6], *flow[:2]], flow[2:4], flow[4:6], flow[6:])

    def run(policy: list[Tensor], z: Tensor) -> Tensor:
        given = (problem.offsets * 1, MLP(policy[:3], policy[3:6], policy[6:8], policy[8:]), wide[:, 6:] * 1, problem.times * 1)
        states, _ = closed_loop(z * 1, *given, dynamics, **problem.options)
        return mlp_flow(states[-1], states[-1] @ (wide[:, :6] * 1).T, problem.times * 1, dynamics, group=3).square().sum()

    def gradients(call) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (problem.z, *problem.policy)]
        loss = call(leaves)
        wasted = [torch.full_like(t, float("nan")) for t in leaves for _ in range(20)]  # takes up what has been freed
        if how == "data":
            for t in leaves:
                t.data = t.data.clone()
        found = torch.autograd.grad(loss, leaves)
        del wasted
        return list(found)

    def otherwise(leaves: list[Tensor]) -> Tensor:
        if how == "checkpoint":
            return torch.utils.checkpoint.checkpoint(run, leaves[1:], leaves[0], use_reentrant=False)
        with Elsewhere() if how == "hooks" else contextlib.nullcontext():
            return run(leaves[1:], leaves[0])

    expected = gradients(lambda leaves: run(leaves[1:], leaves[0]))
    for _ in range(3):
        for found, wanted in zip(gradients(otherwise), expected):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": torch.zeros(70, 2).double()}, r"offsets is torch.float64 \(70, 2\).* must be torch.float64 \(70, 70, 2\)"),
        ({"offsets": torch.zeros(3, 70, 1).double()}, r"offsets is .*\(3, 70, 1\).* a policy of 2 outputs it must be .*\(3, 70, 2\)"),
        ({"offsets": torch.zeros(3, 69, 2).double()}, r"offsets is torch.float64 \(3, 69, 2\)"),
        ({"offsets": torch.zeros(0, 70, 2).double()}, "offsets has no step; give at least one"),
        ({"z": torch.zeros(70, 5).double()}, r"policy: weights\[0\] is torch.float64 \(7, 6\)"),
        ({"z": torch.zeros(70).double()}, "policy: z is torch.float64"),
        ({"times": torch.zeros(2, 9).double()}, r"times is torch.float64 \(2, 9\)"),
        ({"weight": torch.zeros(8, 2).double()}, r"weight is torch.float64 \(8, 2\)"),
        ({"weight": torch.zeros(9, 2)}, "weight is torch.float32"),
        ({"method": "rk4"}, "method is 'rk4'"),
    ],
)
def test_what_does_not_fit_is_told(changes, message):
    problem = Problem()
    wide, *flow = problem.flow
    given = {"z": problem.z, "offsets": problem.offsets, "weight": wide[:, 6:], "times": problem.times, **problem.options, **changes}
    policy = problem.policy
    with pytest.raises(ValueError, match=message):
        closed_loop(
            policy=MLP(policy[:3], policy[3:6], policy[6:8], policy[8:]),
            network=VelocityMLP([wide[:, :6], *flow[:2]], flow[2:4], flow[4:6], flow[6:]),
            **given,
        )
