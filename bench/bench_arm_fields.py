"""``ops.arm`` for declared fields (shallow water: mass, momentum, a bound) against eager torch and torch.compile.

All peers compute the same scores, which the gate holds against the reference in float64, with NaN and infinities in some of the
candidates. ``bytes_moved`` counts each candidate once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from ttcfast.ops import arm
from ttcfast.spec import StateSpec

from . import timing
from .groups import backend_of, compiled, tuned
from .targets import Target
from .timing import Case

CPU_CASES = {"shallow water, N1 B256 128^2": (1, 256, 128), "shallow water, N1 B64 64^2": (1, 64, 64)}
CUDA_CASES = {"shallow water, N1 B1024 256^2": (1, 1024, 256), **CPU_CASES}
TARGETS = (
    Target("shallow water, N1 B256 128^2", "eager", "ratio", least=3),
    Target("shallow water, N1 B256 128^2", "torch.compile", "ratio", least=1.0),
)

Peer = Callable[["Problem"], Tensor]  # -> scores [N, B]


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    for name, (n, b, side) in (CPU_CASES if device == "cpu" else CUDA_CASES).items():
        if tiny:
            n, b, side = min(n, 2), 5, 6
        problem = Problem(n, b, side, device)
        shape = f"[{n}, {b}, 3, {side}, {side}]"
        yield problem.case("arm_fields", name, shape, "float32", problem.peers(tiny), bytes_moved=4 * n * b * 3 * side * side)


class Problem(timing.Problem):
    """Water of depth about 1, and candidates near it that drift a little in every total; some depths are below the bound."""

    def __init__(self, n: int, b: int, side: int, device: str) -> None:
        self.sizes, self.device = (n, b, side), device
        self.spec = StateSpec.fields(
            "h", "hu", "hv", conserved={"mass": "h", "momentum": ("hu", "hv")}, bounds={"h": (0.5, None)}, cell_volume=1 / side**2
        )

    @cached_property
    def state(self) -> Tensor:
        n, _, side = self.sizes
        lowest = torch.tensor([0.6, -0.5, -0.5], device=self.device).reshape(3, 1, 1)
        return lowest + torch.rand(n, 3, side, side, device=self.device, generator=self.generator(1))

    @cached_property
    def cand(self) -> Tensor:
        n, b, side = self.sizes
        generator = self.generator(2)
        cand = torch.randn(n, b, 3, side, side, device=self.device, generator=generator).mul_(0.02)
        cand += 0.05 * torch.randn(n, b, 3, 1, 1, device=self.device, generator=generator)
        cand.add_(self.state.unsqueeze(1))
        cand[:, 0, 0, 0, :2] = 0.2  # dry, below the bound
        cand[-1, 1, 0, 0, 0], cand[-1, 2, 1, 0, 1] = math.nan, math.inf
        return cand

    def peers(self, tiny: bool) -> dict[str, Peer]:
        """Ours first."""
        backend = backend_of("arm_fields", self.device)
        fused = compiled(sliced, tiny=tiny, **tuned(self.device))
        return {
            f"ttcfast, {backend}": lambda p: arm(p.state, p.cand, p.spec, momentum="norm", backend=backend).score,
            "eager": lambda p: sliced(p.state, p.cand, p.spec.cell_volume),
            "torch.compile": lambda p: fused(p.state, p.cand, p.spec.cell_volume),
        }

    def check(self, peers: dict[str, Peer]) -> None:
        expected = arm(self.state.double(), self.cand.double(), self.spec, momentum="norm", backend="reference").score
        for name, function in peers.items():
            found = function(self).double()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=partial("{}: {}".format, name))


def sliced(state: Tensor, cand: Tensor, volume: float) -> Tensor:
    """The same terms; every statistic is a reduction over [N, B] x cells, residuals are sums of per-cell differences."""
    h, hu, hv = (cand[:, :, c].flatten(2) for c in range(3))  # [N, B, cells]
    h0, hu0, hv0 = (state[:, None, c].flatten(2) for c in range(3))  # [N, 1, cells]
    mass = (h - h0).sum(-1).abs() * volume
    momentum = ((hu - hu0).sum(-1) ** 2 + (hv - hv0).sum(-1) ** 2).sqrt() * volume
    outside = torch.relu(0.5 - h).mean(-1)
    finite = ((h - h) + (hu - hu) + (hv - hv)).sum(-1) == 0
    return torch.where(finite, -(mass + momentum + 0.1 * outside), -math.inf)
