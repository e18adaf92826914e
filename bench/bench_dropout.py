"""``ops.keyed_dropout`` against torch's dropout in training mode, as used for MC dropout: forward only.

No two peers drop the same entries, so the gate compares ours with the reference, and checks the rate and the kept values of all peers.
``bytes_moved`` counts the input and the result once.

* ``F.dropout, eager``: the function behind ``nn.Dropout``.
* ``F.dropout, torch.compile``: Inductor generates random numbers inside its loop, with its own Philox.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ttcfast.ops import keyed_dropout
from ttcfast.spec import Key

from . import timing
from .groups import backend_of, compiled
from .targets import Target
from .timing import Case

KEY, RATE = Key(seed=1, step=2, site=3), 0.1

# name: (rows, tokens, width, dtype): transformer activations, one row per candidate
CPU_CASES = {
    "M256 T64 D256": (256, 64, 256, torch.float32),
    "M256 T64 D256 bf16": (256, 64, 256, torch.bfloat16),
    "M16 T64 D128": (16, 64, 128, torch.float32),
}
CUDA_CASES = {
    "M1024 T256 D512": (1024, 256, 512, torch.float32),
    "M1024 T256 D512 bf16": (1024, 256, 512, torch.bfloat16),
    "M64 T64 D256 bf16": (64, 64, 256, torch.bfloat16),
}

# "Keyed dropout forward <= 1.1x the same model with nn.Dropout active" (issue 3) holds for every model if it holds for the operation.
TARGETS = (
    Target("*", "F.dropout, eager", "ratio", least=1 / 1.1, stretch=2),
    Target("*", "F.dropout, eager", "ratio", least=1 / 1.1, device="cuda"),
)

Peer = Callable[["Problem"], Tensor]


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    for name, (m, tokens, width, dtype) in (CPU_CASES if device == "cpu" else CUDA_CASES).items():
        if tiny:
            m, tokens, width = 4, 8, 16
        problem = Problem((m, tokens, width), dtype, device)
        yield problem.case(
            "dropout",
            name,
            f"[{m}, {tokens}, {width}]",
            str(dtype).removeprefix("torch."),
            problem.peers(tiny),
            bytes_moved=2 * m * tokens * width * dtype.itemsize,
        )


class Problem(timing.Problem):
    """Activations without zeros, created on first use."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    @cached_property
    def x(self) -> Tensor:
        return (1 + torch.rand(self.shape, device=self.device, generator=self.generator(1))).to(self.dtype)

    @cached_property
    def rows(self) -> Tensor:
        candidate = torch.arange(self.shape[0], device=self.device)
        return torch.stack([candidate // 32, candidate % 32], 1)

    def peers(self, tiny: bool) -> dict[str, Peer]:
        """Ours first."""
        backend, fused = backend_of("keyed_dropout", self.device), compiled(plain, tiny=tiny)
        return {
            f"ttcfast, {backend}": lambda p: keyed_dropout(p.x, RATE, key=KEY, rows=p.rows, backend=backend),
            "F.dropout, eager": lambda p: plain(p.x),
            "F.dropout, torch.compile": lambda p: fused(p.x),
        }

    def check(self, peers: dict[str, Peer]) -> None:
        for place, (name, function) in enumerate(peers.items()):
            found = function(self)
            if place == 0:
                expected = keyed_dropout(self.x[-2:], RATE, key=KEY, rows=self.rows[-2:], backend="reference")
                if not torch.equal(found[-2:], expected):
                    raise AssertionError(f"{name}: values differ from the reference")
            kept = found != 0
            rate, allowed = 1 - float(kept.double().mean()), 6 * (RATE * (1 - RATE) / kept.numel()) ** 0.5
            if abs(rate - RATE) > allowed:
                raise AssertionError(f"{name}: drops {rate:.5f}, not {RATE} within {allowed:.2g}")
            torch.testing.assert_close(found[kept], self.x[kept] / (1 - RATE), msg=partial("{}: {}".format, name))


def plain(x: Tensor) -> Tensor:
    return F.dropout(x, RATE, training=True)
