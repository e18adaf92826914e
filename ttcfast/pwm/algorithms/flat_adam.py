"""Adam on parameters that lie one after another in memory, so that a step costs a few passes over one vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn


class FlatAdam(torch.optim.Adam):
    """``torch.optim.Adam`` whose one parameter is a vector of which all given parameters become views.

    :meth:`collect` takes the place of ``zero_grad`` and ``clip_grad_norm_``. Its state is that of the vector. Modules that move to another
    device take it along.

    Args:
        parameters: Parameters of one dtype and device.
        lr, betas: As in ``torch.optim.Adam``.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float]) -> None:
        self.views = list(parameters)
        self._starts = [0, *accumulate(p.numel() for p in self.views)]
        vector = nn.Parameter(share([self.views])[0][0])
        super().__init__([vector], lr=lr, betas=betas, fused=vector.device.type in ("cpu", "cuda"))

    @property
    def vector(self) -> nn.Parameter:
        """The parameters one after another."""
        return self.param_groups[0]["params"][0]

    def collect(self, gradients: Sequence[Tensor | None], clip: float) -> Tensor:
        """Take over the gradients of the parameters, None for 0, scaled down to the norm ``clip``; return their norm before, ``[]``.

        The same as ``torch.nn.utils.clip_grad_norm_`` up to rounding.
        """
        first, size = self.vector.data_ptr(), self.vector.element_size()
        if any(p.data_ptr() != first + size * start for p, start in zip(self.views, self._starts)):  # moved, or given other memory
            self.follow(share([self.views])[0][0])
        return self.take(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(self.views, gradients)]), clip)

    def take(self, gradient: Tensor, clip: float) -> Tensor:
        """As :meth:`collect` from the gradient of the vector, which is scaled in place."""
        norm = gradient.norm()
        self.vector.grad = gradient.mul_((clip / (norm + 1e-6)).clamp_(max=1.0))
        return norm

    def follow(self, vector: Tensor) -> None:
        """Take ``vector``, of which the parameters are views by now, with the moments."""
        before, now = self.vector, nn.Parameter(vector)
        self.param_groups[0]["params"] = [now]
        if before in self.state:
            self.state[now] = {name: value.to(now.device) for name, value in self.state.pop(before).items()}


class Stack:
    """The ``FlatAdam`` of S equal modules, whose gradients come from one backward pass for all.

    The vectors become the rows of one matrix. Learning rates, moments and steps stay each optimizer's own.

    Attributes:
        views: The parameters of all modules, ``[S, ...]`` each, in the same memory.
    """

    def __init__(self, optimizers: Sequence[FlatAdam]) -> None:
        self.optimizers = list(optimizers)
        rows, self.views = share([optimizer.views for optimizer in optimizers])
        for optimizer, row in zip(optimizers, rows):
            optimizer.follow(row)

    def collect(self, gradients: Sequence[Tensor | None], clip: float) -> Tensor:
        """Hand each optimizer its part of gradients ``[S, ...]``, as :meth:`FlatAdam.collect` does; return the norms ``[S]``."""
        every = [(torch.zeros_like(p) if g is None else g).flatten(1) for p, g in zip(self.views, gradients)]
        return torch.stack([optimizer.take(row, clip) for optimizer, row in zip(self.optimizers, torch.cat(every, 1))])


@torch.no_grad()
def share(members: Sequence[Sequence[nn.Parameter]]) -> tuple[Tensor, list[nn.Parameter]]:
    """Move the parameters of S equal modules to one matrix, keeping their values.

    Returns:
        The matrix, with a row per module that holds its parameters one after another, and the parameters of all modules, ``[S, ...]`` each.
        They and the modules' own parameters are views of the matrix.
    """
    matrix = torch.stack([torch.cat([p.reshape(-1) for p in parameters]) for parameters in members])
    sizes = [p.numel() for p in members[0]]
    for parameters, row in zip(members, matrix):
        for p, part in zip(parameters, row.split(sizes)):
            p.data = part.view(p.shape)
    parts = zip(members[0], matrix.split(sizes, 1))
    return matrix, [nn.Parameter(part.view(len(members), *p.shape), requires_grad=p.requires_grad) for p, part in parts]
