"""``ops.arm`` against the plan's eager functions and against torch.compile on two formulations of the same terms.

All peers compute the same scores, with mask and finiteness check. The gate compares them with the float64 reference on the timed inputs,
and again after putting NaN, infinities and negative densities into some candidates. ``bytes_moved`` counts each candidate once.

* ``seed, eager``: the functions printed in TTC plan, "Analytical Reward Model (ARM)", per candidate, each integral computed separately.
  In names of peers, ``seed`` stands for the plan's sketch.
* ``tuned, eager``: the fastest formulation we found in eager torch.
* ``natural, torch.compile``: the plan's functions compiled.
* ``sliced, torch.compile``: channels as slices and every statistic a reduction over the same [N, B] x cells, so that Inductor fuses them
  into one pass. Tuned by ``max-autotune-no-cudagraphs`` on CUDA; the graph column is its best number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from ttcfast.ops import arm
from ttcfast.spec import ARMWeights, StateSpec

from . import timing
from .groups import backend_of, compiled, tuned
from .targets import Target
from .timing import Case

W = ARMWeights()
REFERENCE_CANDIDATES = 16  # the reference allocates about twenty float64 copies of its candidates, so it scores this many at a time

# name: (N, B, side, whether every candidate has negative pressures)
CPU_CASES = {
    "N1 B256 128^2": (1, 256, 128, False),
    "N1 B256 128^2 all violating": (1, 256, 128, True),
    "N8 B8 128^2": (8, 8, 128, False),
    "N1 B64 64^2": (1, 64, 64, False),
}
CUDA_CASES = {
    "N1 B1024 256^2": (1, 1024, 256, False),
    "N1 B1024 256^2 all violating": (1, 1024, 256, True),
    "N4 B256 512^2": (4, 256, 512, False),
    "N8 B128 128^2": (8, 128, 128, False),
    "N1 B256 128^2": (1, 256, 128, False),
    "N1 B64 64^2": (1, 64, 64, False),
}

# CPU targets from issue 3, measured against these peers.
_BIG = ("N1 B1024 256^2", "N4 B256 512^2", "N8 B128 128^2")  # at least 256 MB
TARGETS = (
    Target("N1 B256 128^2", "seed, eager", "ratio", least=30),
    Target("N1 B256 128^2", "sliced, torch.compile", "ratio", least=1.3, stretch=1.6),
    Target("N1 B256 128^2", "", "share_of_read", least=0.55),
    *(Target(name, "sliced, torch.compile", "ratio", least=1, threads=2) for name in ("N1 B64 64^2", "N1 B256 128^2 all violating")),
    *(Target(name, "", "share_of_copy", least=0.85, stretch=0.92, device="cuda") for name in _BIG),
    *(Target(name, "sliced, torch.compile", "graph_ratio", least=1.15, device="cuda") for name in _BIG),
    *(Target(name, "natural, torch.compile", "ratio", least=3, device="cuda") for name in _BIG),
    *(Target(name, "seed, eager", "ratio", least=15, device="cuda") for name in _BIG),
    Target("N1 B64 64^2", "", "graph_hot_us", most=6, device="cuda"),
    Target("N1 B64 64^2", "sliced, torch.compile", "graph_hot_ratio", least=3, device="cuda"),
)


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    for name, (n, b, side, violating) in (CPU_CASES if device == "cpu" else CUDA_CASES).items():
        if tiny:
            n, b, side = min(n, 2), 5, 6
        problem = Problem(n, b, side, violating, device)
        yield problem.case(
            "arm", name, f"[{n}, {b}, 4, {side}, {side}]", "float32", problem.peers(tiny), bytes_moved=4 * n * b * 4 * side * side
        )


Peer = Callable[["Problem"], Tensor]  # -> scores [N, B]


class Problem(timing.Problem):
    """A gas state, nearby candidates whose totals drift slightly, and walls as boundary; created on first use."""

    def __init__(self, n: int, b: int, side: int, violating: bool, device: str) -> None:
        self.sizes, self.violating, self.device = (n, b, side), violating, device
        self.volume = 1 / side**2

    @cached_property
    def state(self) -> Tensor:
        n, _, side = self.sizes
        lowest = torch.tensor([1.0, -0.5, -0.5, 2.0], device=self.device).reshape(4, 1, 1)
        state = lowest + torch.rand(n, 4, side, side, device=self.device, generator=self.generator(1))
        if self.violating:
            state[:, 3] -= 4
        return state

    @cached_property
    def cand(self) -> Tensor:
        n, b, side = self.sizes
        generator = self.generator(2)
        cand = torch.randn(n, b, 4, side, side, device=self.device, generator=generator).mul_(0.02)
        drift = 0.05 * torch.randn(n, b, 4, 1, 1, device=self.device, generator=generator)
        return cand.add_(drift).add_(self.state.unsqueeze(1))

    @cached_property
    def mask(self) -> Tensor:
        side = self.sizes[2]
        mask = torch.zeros(side, side, dtype=torch.bool, device=self.device)
        mask[[0, -1]] = mask[:, [0, -1]] = True
        return mask

    @cached_property
    def masked(self) -> Tensor:
        """Return the mask as indices: indexing by a mask would synchronize host and GPU in every call."""
        return self.mask.flatten().nonzero().squeeze(1)

    @cached_property
    def spec(self) -> StateSpec:
        return StateSpec.euler2d(cell_volume=self.volume, boundary_mask=self.mask)

    def peers(self, tiny: bool) -> dict[str, Peer]:
        """Ours first."""
        backend = backend_of("arm", self.device)
        natural, fused = compiled(plan, tiny=tiny), compiled(sliced, tiny=tiny, **tuned(self.device))
        return {
            f"ttcfast, {backend}": lambda p: arm(p.state, p.cand, p.spec, W, backend=backend).score,
            "seed, eager": lambda p: plan(p.state, p.cand, p.masked, p.volume),
            "tuned, eager": lambda p: tuned_eager(p.state, p.cand, p.masked, p.volume),
            "natural, torch.compile": lambda p: natural(p.state, p.cand, p.masked, p.volume),
            "sliced, torch.compile": lambda p: fused(p.state, p.cand, p.mask, p.volume),
        }

    def check(self, peers: dict[str, Peer]) -> None:
        for trouble in (contextlib.nullcontext, self.poisoned):
            with trouble():
                expected = self.expected()
                for name, function in peers.items():
                    # The plan subtracts two float32 integrals, which loses digits: docs/design/decisions.md ("Sums of differences").
                    loose = 1e-5 if name.startswith(("ttcfast", "sliced")) else 1e-4
                    found = function(self).double()
                    torch.testing.assert_close(found, expected, rtol=loose, atol=loose, msg=partial("{}: {}".format, name))

    def expected(self) -> Tensor:
        """Return the scores [N, B] of the float64 reference."""
        spec = self.spec
        parts = [
            arm(self.state.double(), part.double(), spec, W, backend="reference").score
            for part in self.cand.split(REFERENCE_CANDIDATES, dim=1)
        ]
        return torch.cat(parts, 1)

    @contextlib.contextmanager
    def poisoned(self) -> Iterator[None]:
        """Put NaN, both infinities and a negative density into one cell of one candidate each; restore the values on exit."""
        cells = [(0, 0, 1, 1), (1, 1, 2, 0), (2, 3, 0, 3), (3, 0, 3, 2)]  # candidate, channel, row, column
        values = (math.nan, math.inf, -math.inf, -100.0)
        before = [self.cand[-1, b, c, i, j].clone() for b, c, i, j in cells]
        for (b, c, i, j), value in zip(cells, values):
            self.cand[-1, b, c, i, j] = value
        try:
            yield
        finally:
            for (b, c, i, j), old in zip(cells, before):
                self.cand[-1, b, c, i, j] = old


def plan(state: Tensor, cand: Tensor, masked: Tensor, volume: float) -> Tensor:
    """TTC plan, "Analytical Reward Model (ARM)", with a candidate axis: [N, C, H, W] and [N, B, C, H, W] -> [N, B]."""

    def integral(field: Tensor) -> Tensor:
        return (field * volume).sum(dim=(-2, -1))

    mass = (integral(cand[:, :, 0]) - integral(state[:, None, 0])).abs()
    momentum = (integral(cand[:, :, 1:3].sum(dim=2)) - integral(state[:, None, 1:3].sum(dim=2))).abs()
    energy = (integral(cand[:, :, 3]) - integral(state[:, None, 3])).abs()
    boundary = cand.flatten(3).index_select(3, masked).abs().mean((-2, -1))
    rho, e = cand[:, :, 0], cand[:, :, 3]
    u, v = cand[:, :, 1] / (rho + 1e-12), cand[:, :, 2] / (rho + 1e-12)
    p = 0.4 * (e - 0.5 * rho * (u * u + v * v))
    positivity = rho.clamp_max(0).abs().mean((-2, -1)) + p.clamp_max(0).abs().mean((-2, -1))
    score = -(W.w_mass * mass + W.w_momentum * momentum + W.w_energy * energy + W.w_bc * boundary + W.w_positivity * positivity)
    return torch.where(cand.isfinite().flatten(2).all(-1), score, -math.inf)


def tuned_eager(state: Tensor, cand: Tensor, masked: Tensor, volume: float) -> Tensor:
    """Compute the same terms with as few passes and temporaries as eager torch allows."""
    total = (cand.sum((-2, -1)) - state.sum((-2, -1)).unsqueeze(1)) * volume  # [N, B, C]
    mass, momentum, energy = total[..., 0].abs(), total[..., 1:3].sum(-1).abs(), total[..., 3].abs()
    boundary = cand.flatten(3).index_select(3, masked).abs_().mean((-2, -1))
    rho = cand[:, :, 0]
    inverse = (rho + 1e-12).reciprocal_()
    speed = (cand[:, :, 1] * inverse).square_()
    speed += inverse.mul_(cand[:, :, 2]).square_()
    p = speed.mul_(rho).mul_(-0.5).add_(cand[:, :, 3])
    positivity = -rho.clamp_max(0).mean((-2, -1)) - 0.4 * p.clamp_max_(0).mean((-2, -1))
    score = -(W.w_mass * mass + W.w_momentum * momentum + W.w_energy * energy + W.w_bc * boundary + W.w_positivity * positivity)
    # Extrema propagate NaN and cost, on the CPU, a twelfth of isfinite and its temporaries.
    finite = (cand.amax((-3, -2, -1)) < math.inf) & (cand.amin((-3, -2, -1)) > -math.inf)
    return torch.where(finite, score, -math.inf)


def sliced(state: Tensor, cand: Tensor, mask: Tensor, volume: float) -> Tensor:
    """Compute the same terms with every statistic a reduction over [N, B] x cells and residuals as sums of per-cell differences."""
    rho, mx, my, energy = (cand[:, :, c].flatten(2) for c in range(4))  # [N, B, cells]
    rho0, mx0, my0, energy0 = (state[:, None, c].flatten(2) for c in range(4))  # [N, 1, cells]
    edge = mask.flatten()
    mass = (rho - rho0).sum(-1).abs() * volume
    momentum = ((mx - mx0) + (my - my0)).sum(-1).abs() * volume
    change = (energy - energy0).sum(-1).abs() * volume
    inverse = 1 / (rho + 1e-12)
    pressure = 0.4 * (energy - 0.5 * rho * ((mx * inverse) ** 2 + (my * inverse) ** 2))
    negative = (torch.relu(-rho) + torch.relu(-pressure)).mean(-1)
    boundary = torch.where(edge, rho.abs() + mx.abs() + my.abs() + energy.abs(), 0.0).sum(-1) / (4 * edge.sum())
    # x - x is 0 or NaN; of the possible checks, Inductor generates the cheapest code for this one.
    finite = ((rho - rho) + (mx - mx) + (my - my) + (energy - energy)).sum(-1) == 0
    score = -(W.w_mass * mass + W.w_momentum * momentum + W.w_energy * change + W.w_bc * boundary + W.w_positivity * negative)
    return torch.where(finite, score, -math.inf)
