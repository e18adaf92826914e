"""``ops.heun_predict`` and ``ops.heun_correct`` against the plain expressions, eager and compiled.

``bytes_moved`` counts each tensor once. ``grouped`` also subtracts the means of groups of eight from the slopes. Calling an operation
implemented in Python costs about 10 us of host time on the CPU, an expression of two torch functions 5 us, so for small tensors without
groups the expression is faster. The fused loop (bench_mlp_flow) calls the underlying C++ function, which costs 1 us.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from ttcfast.ops import heun_correct, heun_predict
from ttcfast.ops.heun import heun_ref

from . import timing
from .groups import backend_of, compiled
from .targets import Target
from .timing import Case

DT = 0.25
CPU_CASES = {"256x64": (256, 64), "256x512": (256, 512), "4096x512": (4096, 512)}
CUDA_CASES = {"256x512": (256, 512), "4096x1024": (4096, 1024), "65536x1024": (65536, 1024)}
GROUPS = {"plain": 0, "grouped": 8}

TARGETS = (
    *(Target(f"{name} correct grouped", "eager", "ratio", least=1.2) for name in CPU_CASES),
    Target("4096x512 correct plain", "eager", "ratio", least=1.2),
    Target("65536x1024 *", "", "share_of_copy", least=0.85, device="cuda"),
)


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    for name, shape in (CPU_CASES if device == "cpu" else CUDA_CASES).items():
        for step, count in (("predict", 2), ("correct", 3)):
            for kind, group in GROUPS.items():
                problem = Problem((2, 8) if tiny else shape, step, group, device)
                yield problem.case(
                    "heun",
                    f"{name} {step} {kind}",
                    f"[{shape[0]}, {shape[1]}]",
                    "float32",
                    problem.peers(tiny),
                    bytes_moved=4 * shape[0] * shape[1] * (count + 1),
                )


Peer = Callable[["Problem"], Tensor]


class Problem(timing.Problem):
    def __init__(self, shape: tuple[int, int], step: str, group: int, device: str) -> None:
        self.shape, self.step, self.group, self.device = shape, step, group, device

    @cached_property
    def tensors(self) -> list[Tensor]:
        generator = self.generator(1)
        return [torch.randn(self.shape, device=self.device, generator=generator) for _ in range(2 + (self.step == "correct"))]

    def peers(self, tiny: bool) -> dict[str, Peer]:
        backend = backend_of("heun", self.device)
        ours = heun_predict if self.step == "predict" else heun_correct
        plain = partial(expression, group=self.group)
        fused = compiled(plain, tiny=tiny)
        return {
            f"ttcfast, {backend}": lambda p: ours(*p.tensors, DT, group=p.group, backend=backend),
            "eager": lambda p: plain(*p.tensors),
            "torch.compile": lambda p: fused(*p.tensors),
        }

    def check(self, peers: dict[str, Peer]) -> None:
        z, *slopes = (t.double() for t in self.tensors)
        second, step = (slopes[1], 0.5 * DT) if len(slopes) > 1 else (None, DT)
        expected = heun_ref(z, slopes[0], second, step, 1.0, self.group)
        for name, run in peers.items():
            torch.testing.assert_close(run(self).double(), expected, rtol=1e-5, atol=1e-5, msg=partial("{}: {}".format, name))


def expression(z: Tensor, k1: Tensor, k2: Tensor | None = None, *, group: int) -> Tensor:
    slope, step = (k1, DT) if k2 is None else (k1 + k2, 0.5 * DT)
    if group:
        grouped = slope.unflatten(-1, (-1, group))
        slope = (grouped - grouped.mean(-1, keepdim=True)).flatten(-2)
    return z + step * slope
