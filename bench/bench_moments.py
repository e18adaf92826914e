"""``ops.accumulate_moments`` against torch's means to keep running sums and a squared norm of many gradients.

All peers add the gradients to the totals and return the sum of squares. The gate compares both with the reference: totals bit for bit, the
sum to 1e-5 (torch sums float32 squares in float32). ``bytes_moved`` is the traffic of the fused pass: each gradient once, each total twice.

* ``foreach pair``: ``_foreach_add_`` and ``_foreach_norm``, then the norm of the norms.
* ``get_total_norm``: ``torch.nn.utils.get_total_norm`` and ``_foreach_add_``, the public API.
* ``plain loop``: ``add_`` and ``linalg.vector_norm`` tensor by tensor.

With zeroing, each peer also sets the gradients to zero (``_foreach_zero_``, ``zero_``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from ttcfast.ops import accumulate_moments

from . import timing
from .groups import backend_of
from .targets import Target
from .timing import Case

# name: (tensors, total elements, dtype of gradients, dtype of totals, zeroing)
CASES = {
    "24M in 223 tensors": (223, 24_300_000, torch.float32, torch.float32, False),
    "24M in 223 tensors, zeroing": (223, 24_300_000, torch.float32, torch.float32, True),
    "24M in 223 tensors, bfloat16": (223, 24_300_000, torch.bfloat16, torch.float32, False),
    "1.6M in 31 tensors": (31, 1_600_000, torch.float32, torch.float32, False),
    "10M in 110 tensors": (110, 10_000_000, torch.float32, torch.float32, False),
}

_BIG = "24M in 223 tensors"
TARGETS = (  # issue 6
    Target(_BIG, "foreach pair", "ratio", least=1.4, stretch=1.6),
    Target(_BIG, "", "share_of_copy", least=0.85, device="cuda"),
    Target(_BIG, "foreach pair", "graph_ratio", least=1.3, device="cuda"),
    Target(f"{_BIG}, bfloat16", "foreach pair", "graph_ratio", least=1.5, device="cuda"),
    Target("1.6M in 31 tensors", "", "graph_hot_us", most=10, device="cuda"),
    Target("10M in 110 tensors", "get_total_norm", "ratio", least=5, device="cuda"),
)


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    for name, (count, elements, grad, total, zero) in CASES.items():
        if tiny:
            count, elements = 7, 1000
        problem = Problem(count, elements, grad, total, zero, device)
        kinds = [str(dtype).removeprefix("torch.") for dtype in (grad, total)]
        yield problem.case(
            "moments",
            name,
            f"{count} tensors, {elements} elements",
            kinds[0] if grad == total else " into ".join(kinds),
            problem.peers(),
            bytes_moved=elements * ((2 if zero else 1) * grad.itemsize + 2 * total.itemsize),
        )


Peer = Callable[["Problem"], Tensor]  # returns the sum of squares or the norm


class Problem(timing.Problem):
    """Gradients of a model with layers of several sizes, one in six tensors large; created on first use."""

    def __init__(self, count: int, elements: int, grad: torch.dtype, total: torch.dtype, zero: bool, device: str) -> None:
        self.types, self.zero, self.device = (grad, total), zero, device
        small = [elements // count // 8] * (count - 1)
        large = (elements - sum(small)) // len(small[::6])
        self.sizes = [size + (large if i % 6 == 0 else 0) for i, size in enumerate(small)]
        self.sizes.append(elements - sum(self.sizes))
        assert min(self.sizes) >= 0 and sum(self.sizes) == elements

    @cached_property
    def grads(self) -> list[Tensor]:
        generator = self.generator(1)
        return [(1e-3 * torch.randn(n, device=self.device, generator=generator)).to(self.types[0]) for n in self.sizes]

    @cached_property
    def totals(self) -> list[Tensor]:
        return [torch.zeros(n, dtype=self.types[1], device=self.device) for n in self.sizes]

    def peers(self) -> dict[str, Peer]:
        """Ours first."""
        backend = backend_of("accumulate_moments", self.device)
        found: dict[str, Peer] = {
            f"ttcfast, {backend}": lambda p: accumulate_moments(p.grads, p.totals, zero_grads=p.zero, backend=backend),
            "foreach pair": foreach_pair,
            "get_total_norm": total_norm,
            "plain loop": plain_loop,
        }
        return {name: torch.no_grad()(function) for name, function in found.items()}

    def check(self, peers: dict[str, Peer]) -> None:
        grads = [g.clone() for g in self.grads]
        expected = [torch.zeros_like(t) for t in self.totals]
        square = accumulate_moments(grads, expected, backend="reference")
        for name, function in peers.items():
            torch._foreach_zero_(self.totals)
            torch._foreach_copy_(self.grads, grads)
            found = function(self).double()
            found = found if name.startswith("ttcfast") else found.square()
            loose = 1e-12 if name.startswith("ttcfast") else 1e-2 if self.types[0] == torch.bfloat16 else 1e-5
            torch.testing.assert_close(found, square, rtol=loose, atol=0, msg=partial("{}: {}".format, name))
            wanted = [torch.zeros_like(g) for g in grads] if self.zero else grads
            assert all(map(torch.equal, self.totals, expected)), f"{name}: totals differ"
            assert all(map(torch.equal, self.grads, wanted)), f"{name}: gradients differ from the expected ones afterwards"
        torch._foreach_copy_(self.grads, grads)


def foreach_pair(p: Problem) -> Tensor:
    torch._foreach_add_(p.totals, p.grads)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(p.grads)))
    if p.zero:
        torch._foreach_zero_(p.grads)
    return norm


def total_norm(p: Problem) -> Tensor:
    torch._foreach_add_(p.totals, p.grads)
    norm = torch.nn.utils.get_total_norm(p.grads)
    if p.zero:
        torch._foreach_zero_(p.grads)
    return norm


def plain_loop(p: Problem) -> Tensor:
    norms = []
    for total, grad in zip(p.totals, p.grads):
        total.add_(grad)
        norms.append(torch.linalg.vector_norm(grad))
        if p.zero:
            grad.zero_()
    return torch.linalg.vector_norm(torch.stack(norms))
