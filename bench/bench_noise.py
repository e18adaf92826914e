"""``ops.add_noise`` and ``ops.normal`` against torch's generator, with the sum in one pass or several.

No two peers draw the same numbers, so the gate compares ours with the reference and checks the moments of all peers. ``bytes_moved`` counts
the result once; the input states are reused by all candidates.

* ``randn_like, eager``: ``x + sigma * torch.randn_like(x)``, x expanded over the candidates; issue 3 states its ratio against this peer.
* ``torch.add, eager``: the same in one pass less, with ``alpha``.
* ``in place, eager``: noise drawn into the result and scaled and shifted there, without temporaries.
* ``torch.compile``: the first compiled; Inductor generates random numbers inside its loop, with its own Philox.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from ttcfast.ops import add_noise, normal
from ttcfast.spec import Key

from . import timing
from .groups import backend_of, compiled
from .targets import Target
from .timing import Case

KEY, SIGMA = Key(seed=1, step=2, site=3), 0.1

# name: (N, B, side, dtype)
CPU_CASES = {
    "add_noise N8 B32 64^2": (8, 32, 64, torch.float32),
    "add_noise N8 B32 128^2": (8, 32, 128, torch.float32),
    "add_noise N8 B32 64^2 bf16": (8, 32, 64, torch.bfloat16),
    "add_noise N1 B8 32^2": (1, 8, 32, torch.float32),
    "normal N8 B32 64^2": (8, 32, 64, torch.float32),
}
CUDA_CASES = {
    "add_noise N1 B1024 256^2": (1, 1024, 256, torch.float32),
    "add_noise N1 B1024 256^2 bf16": (1, 1024, 256, torch.bfloat16),
    "add_noise N8 B128 128^2": (8, 128, 128, torch.float32),
    "add_noise N1 B64 64^2": (1, 64, 64, torch.float32),
    "normal N1 B1024 256^2": (1, 1024, 256, torch.float32),
}

# CPU targets from issue 3; on CUDA, 0.5e12 normals per second are 2 of the 4.3 TB/s that an H200 reaches when copying.
_BIG = ("add_noise N1 B1024 256^2", "add_noise N8 B128 128^2")
TARGETS = (
    *(Target(name, "randn_like, eager", "ratio", least=2) for name in CPU_CASES if "N8" in name and "add" in name),
    *(Target(name, "randn_like, eager", "ratio", least=2.5, device="cuda") for name in _BIG),
    *(Target(name, "torch.compile", "ratio", least=1.2, device="cuda") for name in _BIG),
    Target("normal N1 B1024 256^2", "", "share_of_copy", least=0.46, device="cuda"),
)

Peer = Callable[["Problem"], Tensor]  # -> [N, B, 4, side, side]


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    for name, (n, b, side, dtype) in (CPU_CASES if device == "cpu" else CUDA_CASES).items():
        if tiny:
            n, b, side = min(n, 2), 5, 6
        problem = Problem(n, b, side, dtype, device)
        peers = problem.draws(tiny) if name.startswith("normal") else problem.sums(tiny)
        yield problem.case(
            "noise",
            name,
            f"[{n}, {b}, 4, {side}, {side}]",
            str(dtype).removeprefix("torch."),
            peers,
            bytes_moved=n * b * 4 * side * side * dtype.itemsize,
        )


class Problem(timing.Problem):
    """States of magnitude 1, created on first use."""

    def __init__(self, n: int, b: int, side: int, dtype: torch.dtype, device: str) -> None:
        self.shape, self.b, self.dtype, self.device = (n, 4, side, side), b, dtype, device

    @cached_property
    def x(self) -> Tensor:
        return torch.rand(self.shape, device=self.device, generator=self.generator(1)).to(self.dtype)

    @cached_property
    def expanded(self) -> Tensor:
        return self.x.unsqueeze(1).expand(-1, self.b, -1, -1, -1)

    @cached_property
    def rows(self) -> Tensor:
        n = self.shape[0]
        problem, candidate = torch.arange(n, device=self.device), torch.arange(self.b, device=self.device)
        return torch.stack([problem.repeat_interleave(self.b), candidate.repeat(n)], 1)

    def sums(self, tiny: bool) -> dict[str, Peer]:
        """Ours first."""
        backend, fused = backend_of("add_noise", self.device), compiled(plain, tiny=tiny)
        return {
            f"ttcfast, {backend}": lambda p: add_noise(p.x, p.b, SIGMA, key=KEY, rows=p.rows, backend=backend),
            "randn_like, eager": lambda p: plain(p.expanded),
            "torch.add, eager": lambda p: torch.add(p.expanded, torch.randn_like(p.expanded), alpha=SIGMA),
            "in place, eager": lambda p: torch.randn_like(p.expanded).mul_(SIGMA).add_(p.expanded),
            "torch.compile": lambda p: fused(p.expanded),
        }

    def draws(self, tiny: bool) -> dict[str, Peer]:
        """Return the peers, ours first, with ``[N B, ...]`` viewed as ``[N, B, ...]``."""
        backend, fused = backend_of("normal", self.device), compiled(torch.randn_like, tiny=tiny)
        shape = (self.shape[0], self.b, *self.shape[1:])
        return {
            f"ttcfast, {backend}": lambda p: normal(len(p.rows), p.shape[1:], key=KEY, rows=p.rows, backend=backend).reshape(shape),
            "torch.randn, eager": lambda p: torch.randn(shape, device=p.device, dtype=p.dtype),
            "torch.compile": lambda p: fused(p.expanded),
        }

    def check(self, peers: dict[str, Peer]) -> None:
        drawn = "torch.randn, eager" in peers
        sigma = 1.0 if drawn else SIGMA
        for place, (name, function) in enumerate(peers.items()):
            found = function(self)
            if found.dtype != self.dtype or found.shape != self.expanded.shape:
                raise AssertionError(f"{name}: {found.dtype} {tuple(found.shape)}, not {self.dtype} {tuple(self.expanded.shape)}")
            if place == 0:
                torch.testing.assert_close(found[-1], self.expected(drawn), msg=partial("{}: {}".format, name))
            z = found.double() if drawn else (found.double() - self.expanded.double()) / sigma
            count, coarse = z.numel(), 0.0 if self.dtype == torch.float32 else 2**-9 / sigma  # rounding to bfloat16
            for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
                error, allowed = abs(float(z.pow(power).mean()) - moment), 6 * (variance / count) ** 0.5 + 6 * coarse**2
                if error > allowed:
                    raise AssertionError(f"{name}: moment {power} is off by {error:.3g}, at most {allowed:.3g}")

    def expected(self, drawn: bool) -> Tensor:
        """Return the last problem's candidates from the reference, ``[B, 4, side, side]``."""
        rows = self.rows[-self.b :]
        if drawn:
            return normal(self.b, self.shape[1:], key=KEY, rows=rows, backend="reference")
        return add_noise(self.x[-1:], self.b, SIGMA, key=KEY, rows=rows, backend="reference")[0]


def plain(x: Tensor) -> Tensor:
    return x + SIGMA * torch.randn_like(x)
