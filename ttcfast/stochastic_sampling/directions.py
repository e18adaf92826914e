"""Structured candidates: the deterministic step moved along a few fields that belong to the state, by keyed coefficients.

Dropout spreads candidates over thousands of dimensions, hardly one of which is where the error lies, so that the best of 16 is barely
better than the deterministic step. Errors of a one-step surrogate are better described relative to the state: a step too short or too long,
fronts a fraction of a cell ahead or behind, edges too smooth. ``LocalFields`` spans those, ``HeadFields`` what a small network has learned.
How much of which is likely, and what goes with what, is learned from the surrogate's errors on the reward split: a Gaussian over
coefficients, of low rank (``ttcfast.experiments.fit_directions``). All of it commutes with shifts of a periodic domain, unlike principal
components of the error fields themselves.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttcfast.checks import whole
from ttcfast.runtime.errors import CheckpointError
from ttcfast.runtime.units import Units

from .keyed import Draw
from .sites import Site

ARCHITECTURE = "directions"
SITE = Site("", "directions", 1.0)  # names the stream


class Directions(nn.Module):
    """``J`` fields of a state and its deterministic step, and a Gaussian over their coefficients.

    A candidate is ``c_0 + delta_std * (strength * sum_j mean_j d_j + scale * sum_r xi_r sum_j spread_jr d_j)``, the ``xi`` standard normals
    keyed by problem and candidate: one number for the whole domain each, or smooth random fields over ``grid`` points per axis. The
    mean over the domain is taken out of channels whose totals the flow keeps, so that such candidates conserve what ``c_0`` does.

    Args:
        channels: C. periodic: per axis. conserved: channels that keep their mean.
        fields: J. rank: of the spread.

    Attributes:
        units: time step and cells that a file says they were learned at.
    """

    kind: ClassVar[str]
    units: Units = Units("directions")
    mean: Tensor
    spread: Tensor

    def __init__(self, channels: int, periodic: Sequence[bool], conserved: Sequence[int], fields: int, rank: int) -> None:
        super().__init__()
        whole("rank", rank, 1)
        self.channels, self.periodic, self.conserved = channels, tuple(bool(p) for p in periodic), tuple(conserved)
        self.register_buffer("mean", torch.zeros(fields))
        self.register_buffer("spread", torch.zeros(fields, rank))

    @property
    def rank(self) -> int:
        return int(self.spread.shape[1])

    def config(self) -> dict[str, Any]:
        return {"channels": self.channels, "periodic": list(self.periodic), "conserved": list(self.conserved), "rank": self.rank}

    def fields(self, state: Tensor, step: Tensor) -> Tensor:
        """``[N, J, C, *S]`` in units of ``delta_std``, of normalised states and steps ``(c_0 - state) / delta_std``, ``[N, C, *S]``."""
        raise NotImplementedError

    def moves(self, state: Tensor, step: Tensor, draw: Draw, *, scale: float = 1.0, strength: float = 1.0, grid: int = 1) -> Tensor:
        """What is added to ``c_0``, ``[N, B, C, *S]`` in units of ``delta_std``, for the ``N * B`` rows of ``draw``."""
        n, space = len(state), state.shape[2:]
        if state.shape[1] != self.channels or len(space) != len(self.periodic):
            raise ValueError(
                f"the directions are of {self.channels} channels on {len(self.periodic)} space axes; states are {tuple(state.shape[1:])}"
            )
        fields = self.fields(state, step).float()
        modes = torch.einsum("njc...,jr->nrc...", fields, self.spread).mul_(scale)
        count = len(draw.rows) // n
        zeros = torch.zeros(len(draw.rows), self.rank, *[grid] * len(space), device=state.device)
        xi = _spread_out(draw.noise(zeros, 1.0, draw.next_number(SITE)), space, self.periodic).unflatten(0, (n, count))  # [N, B, r, *S]
        out = torch.einsum("njc...,j->nc...", fields, self.mean * strength).unsqueeze(1).repeat(1, count, *[1] * (state.ndim - 1))
        for r in range(self.rank):  # one after the other: a candidate is the same to the last bit in any chunk
            out.addcmul_(xi[:, :, r].unsqueeze(2), modes[:, r].unsqueeze(1))
        for channel in self.conserved:
            out[:, :, channel] -= out[:, :, channel].mean(tuple(range(2, 2 + len(space))), keepdim=True)
        return out


class LocalFields(Directions):
    """For each channel: the step and its low-passed part, their slopes along each axis, the Laplacians of step and state, the slopes of the
    state: a step of another length, a shift of the whole or of what moved, more or less diffusion. Nothing is trained but the coefficients.
    """

    kind = "local"

    def __init__(self, channels: int, periodic: Sequence[bool], conserved: Sequence[int] = (), rank: int = 4) -> None:
        super().__init__(channels, periodic, conserved, channels * (6 + 3 * len(periodic)), rank)

    def fields(self, state: Tensor, step: Tensor) -> Tensor:
        axes, p = range(len(self.periodic)), self.periodic
        low = _smooth(step, p, 4)
        found = [step, low, _laplacian(step, p), _laplacian(state, p), _smooth(_laplacian(state, p), p, 4), _smooth(low, p, 8)]
        found += [_slope(field, axis, p) for field in (step, low, state) for axis in axes]
        own = torch.eye(self.channels, device=state.device).view(1, self.channels, self.channels, *[1] * len(p))
        return torch.cat([own * field.unsqueeze(1) for field in found], 1)  # [N, kinds * C, C, *S]


class HeadFields(Directions):
    """Fields of a small convolutional network with several heads, in two space dimensions.

    Heads are trained so that the nearest of them to the true error, state by state, is near (``fit_directions``): they part the errors
    among themselves, where heads trained one by one would all predict the mean.

    Args:
        heads: J. width: channels at half resolution; twice as many at a quarter. blocks: residual blocks at each.
    """

    kind = "heads"

    def __init__(
        self,
        channels: int,
        periodic: Sequence[bool],
        conserved: Sequence[int] = (),
        rank: int = 2,
        *,
        heads: int = 4,
        width: int = 32,
        blocks: int = 2,
    ) -> None:
        super().__init__(channels, periodic, conserved, heads, rank)
        if len(self.periodic) != 2:
            raise ValueError(f"heads are for two space dimensions and periodic names {len(self.periodic)}; use kind='local'")
        self.heads, self.width, self.blocks = heads, width, blocks
        self.lift = nn.Conv2d(2 * channels, width, 4, stride=2)
        self.fine = nn.ModuleList(nn.Conv2d(width, width, 3) for _ in range(2 * blocks))
        self.down = nn.Conv2d(width, 2 * width, 4, stride=2)
        self.coarse = nn.ModuleList(nn.Conv2d(2 * width, 2 * width, 3) for _ in range(2 * blocks))
        self.up = nn.Conv2d(2 * width, 4 * width, 1)
        self.out = nn.Conv2d(width, 4 * heads * channels, 3)
        with torch.no_grad():
            self.out.weight.mul_(0.1)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "heads": self.heads, "width": self.width, "blocks": self.blocks}

    def fields(self, state: Tensor, step: Tensor) -> Tensor:
        if any(cells % 4 for cells in state.shape[2:]):
            raise ValueError(f"these directions need grids of multiples of 4 cells; the states have {tuple(state.shape[2:])}")
        x = torch.cat([state, step], 1).to(self.lift.weight.dtype)
        fine = self._residual(self.fine, self.lift(_padded(x, 1, self.periodic)))
        coarse = self._residual(self.coarse, self.down(_padded(F.gelu(fine), 1, self.periodic)))
        both = F.gelu(fine + F.pixel_shuffle(self.up(F.gelu(coarse)), 2))
        return F.pixel_shuffle(self.out(_padded(both, 1, self.periodic)), 2).unflatten(1, (self.heads, self.channels))

    def _residual(self, convolutions: nn.ModuleList, h: Tensor) -> Tensor:
        for first, second in zip(convolutions[::2], convolutions[1::2]):
            h = h + second(_padded(F.gelu(first(_padded(F.gelu(h), 1, self.periodic))), 1, self.periodic))
        return h


KINDS: dict[str, type[Directions]] = {"local": LocalFields, "heads": HeadFields}


def save_directions(path: str | os.PathLike[str], directions: Directions, info: Mapping[str, Any]) -> None:
    """Write directions and how they were made into one safetensors file.

    Raises:
        OutputError: it cannot be written.
    """
    meta = {"architecture": ARCHITECTURE, "kind": directions.kind, "config": directions.config(), **info}
    from ttcfast.runtime import checkpoints  # only here: the search works without safetensors

    checkpoints.save(path, directions.state_dict(), meta)


def load_directions(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Directions:
    """Directions of a file, in evaluation; the same object again while the file is unchanged.

    Raises:
        CheckpointError: missing, damaged, or not of directions.
    """
    place = Path(path).absolute()  # the same name means another file after a chdir
    changed = place.stat().st_mtime_ns if place.is_file() else -1
    return _load(str(place), changed, str(device))


@functools.lru_cache(maxsize=8)
def _load(path: str, changed: int, device: str) -> Directions:
    from ttcfast.runtime import checkpoints  # only here: the search works without safetensors

    tensors, meta = checkpoints.load(path, {"architecture": ARCHITECTURE})
    if meta.get("kind") not in KINDS:
        raise CheckpointError(f"checkpoint {path} holds directions of kind {meta.get('kind')!r}; this version knows {', '.join(KINDS)}")
    try:
        made = KINDS[meta["kind"]](**meta["config"])
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} describes directions that this version cannot build ({error})") from error
    checkpoints.load_weights(made, tensors, path)
    made.units = Units(f"directions file {path}", meta.get("time_step"), meta.get("cell_volume"))
    return made.eval().requires_grad_(False).to(device)


def _spread_out(nodes: Tensor, space: Sequence[int], periodic: Sequence[bool]) -> Tensor:
    """Standard normals ``[M, r, *grid]`` as smooth fields ``[M, r, *S]``, standard normal in each cell."""
    for axis, (cells, wraps) in enumerate(zip(space, periodic)):
        count = nodes.shape[2 + axis]
        if count == 1:
            continue
        weights = _weights(cells, count, wraps).to(nodes)
        nodes = torch.tensordot(nodes.movedim(2 + axis, -1), weights, ([-1], [1])).movedim(-1, 2 + axis)
    return nodes.expand(*nodes.shape[:2], *space)


def _weights(cells: int, nodes: int, periodic: bool) -> Tensor:
    """``[cells, nodes]``: quarter waves between neighbours, whose squares add up to 1, so that the variance is the same everywhere."""
    place = torch.arange(cells, dtype=torch.float64) * (nodes / cells if periodic else (nodes - 1) / max(1, cells - 1))
    distance = (place[:, None] - torch.arange(nodes, dtype=torch.float64)).abs()
    if periodic:
        distance = torch.minimum(distance, nodes - distance)
        if nodes == 2:  # the same two nodes on both sides
            return torch.cos(distance * math.pi / 2)
    return torch.where(distance < 1, torch.cos(distance * math.pi / 2), 0.0)


def _padded(x: Tensor, margin: int, periodic: Sequence[bool]) -> Tensor:
    """Ghost cells around ``[N, C, *S]``: wrapped on periodic axes, edge values elsewhere."""
    for axis, wraps in enumerate(periodic, 2):
        cells = x.shape[axis]
        low, high = (x.narrow(axis, cells - margin, margin), x.narrow(axis, 0, margin)) if wraps else _edges(x, axis, margin)
        x = torch.cat([low, x, high], axis)
    return x


def _edges(x: Tensor, axis: int, margin: int) -> tuple[Tensor, Tensor]:
    low, high = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
    return torch.cat([low] * margin, axis), torch.cat([high] * margin, axis)


def _neighbours(x: Tensor, axis: int, periodic: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """The cells before and behind along space axis ``axis``."""
    at, cells = axis + 2, x.shape[axis + 2]
    if periodic[axis]:
        return x.roll(1, at), x.roll(-1, at)
    low, high = _edges(x, at, 1)
    return torch.cat([low, x.narrow(at, 0, cells - 1)], at), torch.cat([x.narrow(at, 1, cells - 1), high], at)


def _slope(x: Tensor, axis: int, periodic: Sequence[bool]) -> Tensor:
    before, behind = _neighbours(x, axis, periodic)
    return (behind - before) / 2


def _laplacian(x: Tensor, periodic: Sequence[bool]) -> Tensor:
    return sum((sum(_neighbours(x, axis, periodic)) - 2 * x for axis in range(len(periodic))), torch.zeros_like(x))


def _smooth(x: Tensor, periodic: Sequence[bool], times: int) -> Tensor:
    """Binomial averages (1, 2, 1) / 4 along every axis, ``times`` times."""
    for _ in range(times):
        for axis in range(len(periodic)):
            x = (sum(_neighbours(x, axis, periodic)) + 2 * x) / 4
    return x
