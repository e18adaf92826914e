"""A Fourier neural operator with dropout that maps one normalised 2-D state on a periodic grid to its normalised change."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttcfast.checks import at_least


@dataclass(frozen=True)
class FNOConfig:
    """Sizes of ``FNO``.

    Args:
        channels: Channels of the state.
        grid: Cells per axis (x, y).
        width: Channels of the hidden fields.
        modes: Waves per axis and sign on which the spectral layers act; at most half of the cells.
        depth: Number of layers.
        dropout: Dropout rate after every layer.
        waves: Wave numbers k along y whose sin and cos are given to the model, as the phase of a forcing is.
        periodic: Whether each axis is periodic, which both must be.

    Raises:
        ValueError: A size is out of range, or an axis is not periodic.
    """

    channels: int = 1
    grid: tuple[int, int] = (32, 32)
    width: int = 24
    modes: int = 12
    depth: int = 4
    dropout: float = 0.02
    waves: tuple[int, ...] = ()
    periodic: tuple[bool, bool] = (True, True)

    def __post_init__(self) -> None:
        for name in ("grid", "periodic", "waves"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("channels", "width", "modes", "depth"):
            at_least(name, getattr(self, name), 1)
        if not all(self.periodic):
            raise ValueError(f"periodic is {self.periodic}; a Fourier neural operator takes periodic axes, use architecture=vit for others")
        if self.modes > min(self.grid) // 2:
            raise ValueError(f"modes is {self.modes} on a grid of {self.grid}; give at most {min(self.grid) // 2}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; a dropout rate lies in [0, 1)")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class FNO(nn.Module):
    """Lifting, layers of a spectral and a local convolution with residual connections, and a projection.

    ``forward(x [N, C, X, Y] normalised) -> [N, C, X, Y]``, the change over one step in units of its standard deviation. The model commutes
    with shifts along x, and along y where ``waves`` is empty. ``latent_module`` names the module whose output is the latent.

    Source: Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations", 2021 (arXiv:2010.08895).
    """

    latent_module = "lift"
    phases: Tensor

    def __init__(self, config: FNOConfig) -> None:
        super().__init__()
        self.config = config
        y = torch.arange(config.grid[1]) * (2 * math.pi / config.grid[1])
        phases = [wave for k in config.waves for wave in ((k * y).sin(), (k * y).cos())]
        stacked = torch.stack(phases) if phases else torch.zeros(0, config.grid[1])
        self.register_buffer("phases", stacked[None, :, None].expand(1, -1, *config.grid).contiguous(), persistent=False)
        self.lift = nn.Conv2d(config.channels + len(phases), config.width, 1)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.project, self.out = nn.Conv2d(config.width, 64, 1), nn.Conv2d(64, config.channels, 1)
        # The untrained model is persistence: the first steps of training do not have to unlearn noise.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != (self.config.channels, *self.config.grid):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this FNO takes [N, {self.config.channels}, {', '.join(map(str, self.config.grid))}]"
            )
        z = self.lift(torch.cat([x, self.phases.to(x.dtype).expand(len(x), -1, -1, -1)], 1))
        for layer in self.layers:
            z = layer(z)
        return self.out(F.gelu(self.project(z)))


class Layer(nn.Module):
    """``z + dropout(gelu(spectral(z) + local(z)))`` for ``z [N, width, X, Y]``."""

    def __init__(self, config: FNOConfig) -> None:
        super().__init__()
        self.modes = config.modes
        # Real and imaginary parts; for positive and for negative waves along x.
        self.weight = nn.Parameter(torch.randn(2, config.width, config.width, config.modes, config.modes, 2) / config.width)
        self.local = nn.Conv2d(config.width, config.width, 3, padding=1, padding_mode="circular")
        self.drop = nn.Dropout(config.dropout)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.drop(F.gelu(self._spectral(z) + self.local(z)))

    def _spectral(self, z: Tensor) -> Tensor:
        wide = torch.promote_types(z.dtype, torch.float32)  # there are no spectra in half precision
        m, amplitudes = self.modes, torch.fft.rfft2(z.to(wide))
        positive, negative = torch.view_as_complex(self.weight.to(wide)).unbind(0)
        out = torch.zeros_like(amplitudes)
        out[:, :, :m, :m] = torch.einsum("nixy,ioxy->noxy", amplitudes[:, :, :m, :m], positive)
        out[:, :, -m:, :m] = torch.einsum("nixy,ioxy->noxy", amplitudes[:, :, -m:, :m], negative)
        return torch.fft.irfft2(out, s=z.shape[-2:]).to(z.dtype)
