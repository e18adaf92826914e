"""``ESNRMeter`` with ghost norms against unmeasured training steps and against other ways to measure.

Every peer but ``forward`` leaves the gradient of the same batch in ``.grad``. The gate compares these gradients with the plain one, and the
measured values with the ESNR of explicitly formed microbatch gradients.

* ``plain step``: forward and backward of the whole batch, without measurement.
* ``plain chunks``: the same in M chunks, without measurement: the baseline of ``loop``.
* ``loop``: ``ESNRMeter(method="loop")``.
* ``vmap(grad)``: all microbatch gradients at once with ``torch.func``, then ``esnr`` of them.
* ``forward``: the forward alone, to compare backward passes: (step - forward) against (plain step - forward).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ttcfast.pwm.utils.metrics import ESNR, ESNRMeter, esnr

from . import timing
from .targets import Target
from .timing import Case

# name: (width, LayerNorm, batch, microbatches, steps that share the weights)
CASES = {
    "MLP 3x512 per sample": (512, False, 1024, 1024, 1),
    "MLP 3x512 LayerNorm per sample": (512, True, 1024, 1024, 1),
    "MLP 3x512 M16": (512, False, 1024, 16, 1),
    "MLP 3x512 LayerNorm M16": (512, True, 1024, 16, 1),
    "MLP 3x256 LayerNorm H16 per sample": (256, True, 128, 128, 16),
    "MLP 3x256 LayerNorm H16 M16": (256, True, 128, 16, 16),
}

TARGETS = (  # issue 6: at most 1.2 times a plain backward, so a ratio of at least 1 / 1.2; 1.08 times on a GPU
    Target("MLP 3x512* per sample", "plain step", "ratio", least=0.83),
    Target("MLP 3x512* per sample", "plain step", "ratio", least=0.92, device="cuda"),
    Target("MLP 3x512* M16", "plain step", "ratio", least=0.83, device="cuda"),
    Target("MLP 3x512* M16", "loop", "ratio", least=3, device="cuda"),
)


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    for name, (width, norm, batch, count, steps) in CASES.items():
        if tiny:
            width, batch, count, steps = 8, 12, 12 if batch == count else 3, min(steps, 2)
        problem = Problem(width, norm, batch, count, steps, device)
        yield problem.case(
            "esnr",
            name,
            f"[{batch}, {width}] x {steps} steps, M = {count}",
            "float32",
            problem.peers(),
            note="one host synchronization per measurement" if device == "cuda" else "",
        )


Peer = Callable[["Problem"], Any]


class Problem(timing.Problem):
    """A residual MLP applied ``steps`` times with a mean squared error as loss; created on first use."""

    def __init__(self, width: int, norm: bool, batch: int, count: int, steps: int, device: str) -> None:
        self.width, self.norm, self.batch, self.count, self.steps, self.device = width, norm, batch, count, steps, device

    @cached_property
    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Linear(self.width, self.width), *([nn.LayerNorm(self.width)] if self.norm else []), nn.Mish()]
        torch.manual_seed(1)
        return nn.Sequential(*layers, nn.Linear(self.width, self.width)).to(self.device)

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        generator = self.generator(2)
        x, noise = (torch.randn(self.batch, self.width, device=self.device, generator=generator) for _ in range(2))
        return x, x.roll(1, 1) + 0.5 * noise

    @cached_property
    def ghost(self) -> ESNRMeter:
        return ESNRMeter(self.model, self.count, method="ghost")

    @cached_property
    def loop(self) -> ESNRMeter:
        return ESNRMeter(self.model, self.count)

    def loss_of(self, x: Tensor, y: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        call = call or self.model
        for _ in range(self.steps):
            x = x + call(x)
        return (x - y).square().mean()

    def peers(self) -> dict[str, Peer]:
        """Return the peers, ours first. Chunks of a single sample are left out as too slow to compete."""
        several: dict[str, Peer] = {"loop": loop, "plain chunks": plain_chunks, "vmap(grad)": mapped}
        others = several if self.count < self.batch else {}
        return {"ttcfast, ghost": ghost, "plain step": plain_step, **others, "forward": forward}

    def check(self, peers: dict[str, Peer]) -> None:
        parameters = list(self.model.parameters())
        grads = [torch.autograd.grad(self.loss_of(*chunk), parameters) for chunk in zip(*(t.chunk(self.count) for t in self.data))]
        expected = esnr(grads, microbatch_size=self.batch // self.count)
        plain = torch.autograd.grad(self.loss_of(*self.data), parameters)
        for name, function in peers.items():
            found = function(self)
            if name != "forward":
                size = max(float(g.abs().max()) for g in plain)
                for p, g in zip(parameters, plain):
                    torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-4 * size, msg=partial("{}: {}".format, name))
            if isinstance(found, ESNR):
                values = torch.tensor(found), torch.tensor(expected)
                torch.testing.assert_close(*values, rtol=1e-4, atol=0, equal_nan=True, msg=partial("{}: {}".format, name))


def plain_step(p: Problem) -> None:
    p.model.zero_grad()
    p.loss_of(*p.data).backward()


def plain_chunks(p: Problem) -> None:
    p.model.zero_grad()
    for chunk in zip(*(t.chunk(p.count) for t in p.data)):
        (p.loss_of(*chunk) / p.count).backward()


def forward(p: Problem) -> None:
    p.loss_of(*p.data)


def ghost(p: Problem) -> ESNR:
    p.model.zero_grad()
    return p.ghost.measure(p.loss_of, *p.data).esnr


def loop(p: Problem) -> ESNR:
    p.model.zero_grad()
    return p.loop.measure(p.loss_of, *p.data).esnr


def mapped(p: Problem) -> ESNR:
    named = {name: parameter.detach() for name, parameter in p.model.named_parameters()}

    def of_chunk(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return p.loss_of(x, y, lambda z: functional_call(p.model, weights, (z,)))

    chunks = (t.unflatten(0, (p.count, -1)) for t in p.data)
    grads = vmap(grad(of_chunk), (None, 0, 0))(named, *chunks)
    for name, parameter in p.model.named_parameters():
        parameter.grad = grads[name].mean(0)
    return esnr(list(zip(*(g.unbind(0) for g in grads.values()))), microbatch_size=p.batch // p.count)
