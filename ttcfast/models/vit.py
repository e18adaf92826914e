"""A vision transformer with dropout that maps one normalised 2-D state to its normalised change."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttcfast.checks import at_least

from .periodic import GridConv2d


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of :class:`ViT`.

    Args:
        channels: Channels of the state.
        grid: Cells per axis (x, y).
        patch: Cells per token and axis.
        width, depth, heads: Sizes of the transformer.
        mlp_ratio: Hidden width of its MLPs over ``width``.
        dropout: Dropout rate after attention and after the MLP of every block.
        refine: Channels of the full-resolution head, which adds detail below the patch size.
        periodic: Whether each axis is periodic. Positions then wrap around, and the model commutes with shifts by whole patches.
    """

    channels: int = 4
    grid: tuple[int, int] = (64, 64)
    patch: int = 4
    width: int = 128
    depth: int = 6
    heads: int = 4
    mlp_ratio: float = 4.0
    dropout: float = 0.02
    refine: int = 16
    periodic: tuple[bool, bool] = (True, True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        object.__setattr__(self, "periodic", tuple(self.periodic))
        for name in ("channels", "patch", "width", "depth", "heads", "refine"):
            at_least(name, getattr(self, name), 1)
        if any(g % self.patch for g in self.grid):
            raise ValueError(f"grid is {self.grid} and patch {self.patch}; the patch must divide both axes")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width} and heads {self.heads}; the heads must divide the width")
        if (self.width // self.heads) % 2:
            raise ValueError(f"width / heads is {self.width // self.heads}; rotary positions need it even")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; a dropout rate lies in [0, 1)")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ViT(nn.Module):
    """Patch embedding, transformer blocks with a depthwise convolution, and a full-resolution head.

    ``forward(x [N, C, X, Y] normalised) -> [N, C, X, Y]``, the change over one step in units of its standard deviation.
    ``latent_module`` names the module whose output is the latent (``[N, X/patch, Y/patch, width]``).

    Source: the paper's surrogate is a ViT used image to image (arXiv:2509.02846); sizes are ours.
    """

    latent_module = "blocks.0"
    full_precision = ("unpatch", "out")  # with Surrogate(dtype=): a third of the error in the candidates' totals, a hundredth of the time

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        tokens = (config.grid[0] // config.patch, config.grid[1] // config.patch)
        self.embed = GridConv2d(config.channels, config.width, 2 * config.patch, stride=config.patch, periodic=config.periodic)
        self.blocks = nn.ModuleList(Block(config, tokens) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.unpatch = nn.Linear(config.width, config.refine * config.patch**2)
        mixed = config.refine + config.channels
        self.mix = GridConv2d(mixed, 2 * config.refine, 3, periodic=config.periodic)
        self.out = GridConv2d(2 * config.refine, config.channels, 3, periodic=config.periodic)
        # The untrained model is persistence: the first steps of training do not have to unlearn noise.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != (self.config.channels, *self.config.grid):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this ViT takes [N, {self.config.channels}, {', '.join(map(str, self.config.grid))}]"
            )
        x = x.contiguous(memory_format=torch.channels_last)  # faster convolutions, whose results are the tokens without a copy
        z = self.embed(x).permute(0, 2, 3, 1)  # [N, X/p, Y/p, D]
        for block in self.blocks:
            z = block(z)
        fine = F.pixel_shuffle(self.unpatch(self.norm(z)).permute(0, 3, 1, 2), self.config.patch)
        return self.out(F.gelu(self.mix(torch.cat([fine, x.to(fine.dtype)], 1)))).contiguous()


class Block(nn.Module):
    """Depthwise 3x3 convolution, self-attention, MLP; each added to its input ``[N, X, Y, D]``."""

    def __init__(self, config: ViTConfig, tokens: tuple[int, int]) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.local = GridConv2d(width, width, 3, periodic=config.periodic, groups=width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, config.heads, tokens, config.periodic)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.drop1, self.drop2 = nn.Dropout(config.dropout), nn.Dropout(config.dropout)

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.local(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        z = z + self.drop1(self.attention(self.norm1(z)))
        return z + self.drop2(self.mlp(self.norm2(z)))


class Attention(nn.Module):
    """Multi-head self-attention whose scores depend on relative positions alone.

    Queries and keys are rotated by an angle that grows with the position (rotary embedding, arXiv:2104.09864). On a periodic axis the
    frequencies are whole turns around the torus, so that wrapping around changes nothing.
    """

    low_precision = ("qkv",)  # rotated in low precision, since they are rounded for attention anyway
    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, tokens: tuple[int, int], periodic: tuple[bool, bool]) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        angles = rotary_angles(tokens, periodic, width // heads)
        # For the pairs (a, b) of each head, which lie half a head apart: a cos - b sin, and b cos + a sin. [XY, 2 D]
        self.register_buffer("cos", angles.cos().repeat(1, 4 * heads), persistent=False)
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], -1).repeat(1, 2 * heads), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        n, x, y, d = z.shape
        qk, v = self.qkv(z).flatten(1, 2).split([2 * d, d], -1)
        q, k = self._rotated(qk).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        return self.project(mixed.transpose(1, 2).reshape(n, x, y, d))

    def _rotated(self, qk: Tensor) -> Tensor:
        """Rotate queries and keys ``[N, XY, 2 D]`` of all heads at once, in three passes over memory."""
        width = qk.shape[-1] // (2 * self.heads)
        partner = qk.unflatten(-1, (2 * self.heads, width)).roll(width // 2, -1).flatten(-2)
        return torch.addcmul(qk * self.cos.to(qk.dtype), partner, self.sin.to(qk.dtype))


def rotary_angles(tokens: tuple[int, int], periodic: tuple[bool, bool], head_width: int) -> Tensor:
    """Return rotation angles ``[XY, head_width / 2]``; the first half rotates along x, the rest along y."""
    pairs = head_width // 2
    angles = []
    for axis, (n, wraps) in enumerate(zip(tokens, periodic, strict=True)):
        count = pairs - pairs // 2 if axis == 0 else pairs // 2
        if wraps:
            frequency = 2 * math.pi / n * (1 + torch.arange(count) % max(n // 2, 1))
        else:
            frequency = 10000.0 ** (-torch.arange(count) / max(count, 1))
        at = torch.arange(n)[:, None] * frequency  # [n, count]
        shape = (n, 1, count) if axis == 0 else (1, n, count)
        angles.append(at.reshape(shape).expand(*tokens, count))
    return torch.cat(angles, -1).flatten(0, 1).float()
