"""``ops.norm_mish`` at the widths of the world models, forward and with its gradient, against torch's three separate functions.

* ``eager``: ``mish(layer_norm(x + bias))`` with autograd.
* ``torch.compile``: the same compiled.

``bytes_moved`` counts x and y once in the forward pass, and additionally x and the gradients of y and x in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ttcfast.ops import norm_mish

from . import timing
from .groups import backend_of, compiled
from .targets import Target
from .timing import Case

CPU_CASES = {"256x128": (256, 128), "256x512": (256, 512), "4096x512": (4096, 512)}
CUDA_CASES = {"256x512": (256, 512), "4096x1024": (4096, 1024), "16384x1792": (16384, 1792)}

TARGETS = (
    *(Target(f"{name} forward", "eager", "ratio", least=2) for name in CPU_CASES),
    *(Target(f"{name} backward", "eager", "ratio", least=2 if "512" in name else 1.2) for name in CPU_CASES),
    Target("16384x1792 *", "", "share_of_copy", least=0.7, device="cuda"),
    Target("* *", "torch.compile", "graph_ratio", least=1, device="cuda"),
)


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    for name, (rows, width) in (CPU_CASES if device == "cpu" else CUDA_CASES).items():
        for backward in (False, True):
            problem = Problem(*((3, 5) if tiny else (rows, width)), backward, device)
            yield problem.case(
                "norm_mish",
                f"{name} {'backward' if backward else 'forward'}",
                f"[{rows}, {width}]",
                "float32",
                problem.peers(tiny),
                bytes_moved=4 * rows * width * (5 if backward else 2),
            )


Peer = Callable[["Problem"], Sequence[Tensor]]


class Problem(timing.Problem):
    def __init__(self, rows: int, width: int, backward: bool, device: str) -> None:
        self.shape, self.backward, self.device = (rows, width), backward, device

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Return x, bias, scale and shift."""
        generator = self.generator(1)
        shapes = [self.shape, *[self.shape[1:]] * 3]
        return [torch.randn(s, device=self.device, generator=generator).requires_grad_(self.backward) for s in shapes]

    @cached_property
    def grad(self) -> Tensor:
        return torch.randn(self.shape, device=self.device, generator=self.generator(2))

    def peers(self, tiny: bool) -> dict[str, Peer]:
        backend, fused = backend_of("norm_mish", self.device), compiled(eager, tiny=tiny)
        ours = partial(norm_mish, backend=backend)
        return {
            f"ttcfast, {backend}": lambda p: p.run(ours),
            "eager": lambda p: p.run(eager),
            "torch.compile": lambda p: p.run(fused),
        }

    def run(self, function: Callable[..., Tensor]) -> Sequence[Tensor]:
        if not self.backward:
            with torch.no_grad():
                return [function(*self.tensors)]
        found = function(*self.tensors)
        return [found.detach(), *torch.autograd.grad(found, self.tensors, self.grad)]

    def check(self, peers: dict[str, Peer]) -> None:
        wide = [t.detach().double().requires_grad_() for t in self.tensors]
        result = eager(*wide)
        expected = [result.detach(), *torch.autograd.grad(result, wide, self.grad.double())]
        for name, run in peers.items():
            for found, true in zip(run(self), expected):
                error = (found.double() - true).norm() / true.norm()
                assert float(error) < 1e-5, f"{name}: relative error {float(error):.1e} in the tensor of shape {tuple(found.shape)}"


def eager(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.mish(F.layer_norm(x + bias, bias.shape, scale, shift))
