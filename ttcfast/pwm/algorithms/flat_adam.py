"""Adam on parameters that lie one after another in memory, so that a step costs a few passes over one vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class FlatAdam(torch.optim.Adam):
    """``torch.optim.Adam`` whose one parameter is a vector of which all given parameters become views.

    :meth:`collect` takes the place of ``zero_grad`` and ``clip_grad_norm_``. Its state is that of the vector. Modules that
    move to another device take it along.

    Args:
        parameters: Parameters of one dtype and device.
        lr, betas: As in ``torch.optim.Adam``.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float]) -> None:
        self.views = list(parameters)
        vector = self._attached()
        super().__init__([vector], lr=lr, betas=betas, fused=vector.device.type in ("cpu", "cuda"))

    @property
    def vector(self) -> nn.Parameter:
        """The parameters one after another."""
        return self.param_groups[0]["params"][0]

    @torch.no_grad()
    def _attached(self) -> nn.Parameter:
        """Return a vector of the parameters' values, of which they have become views."""
        vector = nn.Parameter(torch.cat([p.reshape(-1) for p in self.views]))
        for p, part in zip(self.views, vector.detach().split([p.numel() for p in self.views])):
            p.data = part.view(p.shape)
        return vector

    def collect(self, gradients: Sequence[Tensor | None], clip: float) -> Tensor:
        """Take over the gradients of the parameters, None for 0, scaled down to the norm ``clip``; return their norm before, ``[]``.

        The same as ``torch.nn.utils.clip_grad_norm_`` up to rounding.
        """
        first = self.views[0]
        if first.device != self.vector.device or first.data_ptr() != self.vector.data_ptr():
            self._attach_again()
        whole = torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(self.views, gradients)])
        norm = whole.norm()
        self.vector.grad = whole.mul_((clip / (norm + 1e-6)).clamp_(max=1.0))
        return norm

    def _attach_again(self) -> None:
        """Follow parameters that were moved to another device or given other memory, with the moments."""
        before, vector = self.vector, self._attached()
        self.param_groups[0]["params"] = [vector]
        if before in self.state:
            self.state[vector] = {name: value.to(vector.device) for name, value in self.state.pop(before).items()}
