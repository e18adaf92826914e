"""Structured candidates: the deterministic step plus keyed combinations of a few fields computed from the state.

Dropout spreads candidates over thousands of dimensions, few of which contain the error, so that the best of 16 hardly improves on the
deterministic step. The errors of a one-step surrogate are better described relative to the state: a step too short or too long, fronts a
fraction of a cell ahead or behind, edges too smooth. ``LocalFields`` spans these; ``HeadFields`` spans what a small network has learned. A
low-rank Gaussian over the coefficients, fitted to the surrogate's errors on the reward split (``ttcfast.experiments.fit_directions``),
describes their sizes and correlations. Unlike principal components of the error fields, all of this commutes with shifts of a periodic
domain.
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
SITE = Site("", "directions", 1.0)  # names the random stream


class Directions(nn.Module):
    """``J`` fields of a state and its deterministic step, with a Gaussian over their coefficients.

    A candidate is ``c_0 + delta_std * (strength * sum_j mean_j d_j + scale * sum_r xi_r sum_j spread_jr d_j)``, where the ``xi`` are
    standard normals keyed by problem and candidate: one number for the whole domain each, or smooth random fields over ``grid`` points per
    axis. The domain mean is removed from channels whose totals the flow conserves, so that candidates conserve what ``c_0`` does.

    Args:
        channels: C.
        periodic: One flag per axis.
        conserved: Channels that keep their mean.
        fields: J.
        rank: Rank of the spread.

    Attributes:
        units: Time step and cell volume at which they were fitted, if loaded from a file.
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
        """Returns the arguments of the constructor, as JSON values."""
        return {"channels": self.channels, "periodic": list(self.periodic), "conserved": list(self.conserved), "rank": self.rank}

    def fields(self, state: Tensor, step: Tensor) -> Tensor:
        """Returns fields ``[N, J, C, *S]`` in units of ``delta_std``.

        Args:
            state: Normalised states, ``[N, C, *S]``.
            step: Deterministic steps ``(c_0 - state) / delta_std``, ``[N, C, *S]``.
        """
        raise NotImplementedError

    def moves(self, state: Tensor, step: Tensor, draw: Draw, *, scale: float = 1.0, strength: float = 1.0, grid: int = 1) -> Tensor:
        """Returns what is added to ``c_0`` for the ``N * B`` rows of ``draw``, ``[N, B, C, *S]`` in units of ``delta_std``.

        Raises:
            ValueError: The states have other channels or space axes.
        """
        n, space = len(state), state.shape[2:]
        if state.shape[1] != self.channels or len(space) != len(self.periodic):
            raise ValueError(
                f"the directions have {self.channels} channels on {len(self.periodic)} space axes; the states are {tuple(state.shape[1:])}"
            )
        fields = self.fields(state, step).float()
        modes = torch.einsum("njc...,jr->nrc...", fields, self.spread).mul_(scale)
        count = len(draw.rows) // n
        zeros = torch.zeros(len(draw.rows), self.rank, *[grid] * len(space), device=state.device)
        xi = _spread_out(draw.noise(zeros, 1.0, draw.next_number(SITE)), space, self.periodic).unflatten(0, (n, count))  # [N, B, r, *S]
        out = torch.einsum("njc...,j->nc...", fields, self.mean * strength).unsqueeze(1).repeat(1, count, *[1] * (state.ndim - 1))
        for r in range(self.rank):  # one by one, so that a candidate has the same bits in any chunk
            out.addcmul_(xi[:, :, r].unsqueeze(2), modes[:, r].unsqueeze(1))
        for channel in self.conserved:
            out[:, :, channel] -= out[:, :, channel].mean(tuple(range(2, 2 + len(space))), keepdim=True)
        return out


class LocalFields(Directions):
    """Fields that need no training: per channel, the step and its low-passed part, their slopes along each axis, the Laplacians of step and
    state, and the slopes of the state. They describe steps of another length, shifts, and more or less diffusion.
    """

    kind = "local"

    def __init__(self, channels: int, periodic: Sequence[bool], conserved: Sequence[int] = (), rank: int = 4) -> None:
        super().__init__(channels, periodic, conserved, channels * (6 + 3 * len(periodic)), rank)

    def fields(self, state: Tensor, step: Tensor) -> Tensor:
        axes, p = range(len(self.periodic)), self.periodic
        low = _smooth(step, p, 4)
        found = [step, low, _laplacian(step, p), _laplacian(state, p), _smooth(_laplacian(state, p), p, 4), _smooth(low, p, 8)]
        for before, behind in (_neighbours(field, axis, p) for field in (step, low, state) for axis in axes):
            found.append((behind - before) / 2)
        own = torch.eye(self.channels, device=state.device).view(1, self.channels, self.channels, *[1] * len(p))
        return torch.cat([own * field.unsqueeze(1) for field in found], 1)  # [N, kinds * C, C, *S]


class HeadFields(Directions):
    """Fields of a small convolutional network with several heads, in two space dimensions.

    Heads are trained so that, state by state, the nearest one is close to the true error (``fit_directions``). They thereby divide the
    errors among themselves, whereas heads trained separately would all predict the mean.

    Args:
        channels, periodic, conserved, rank: See ``Directions``.
        heads: J.
        width: Channels at half resolution; twice as many at a quarter.
        blocks: Residual blocks at each resolution.

    Raises:
        ValueError: There are not two space dimensions.
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
        fine = self._residual(self.fine, self.lift(_padded(x, self.periodic)))
        coarse = self._residual(self.coarse, self.down(_padded(F.gelu(fine), self.periodic)))
        both = F.gelu(fine + F.pixel_shuffle(self.up(F.gelu(coarse)), 2))
        return F.pixel_shuffle(self.out(_padded(both, self.periodic)), 2).unflatten(1, (self.heads, self.channels))

    def _residual(self, convolutions: nn.ModuleList, h: Tensor) -> Tensor:
        for first, second in zip(convolutions[::2], convolutions[1::2]):
            h = h + second(_padded(F.gelu(first(_padded(F.gelu(h), self.periodic))), self.periodic))
        return h


KINDS: dict[str, type[Directions]] = {"local": LocalFields, "heads": HeadFields}


def save_directions(path: str | os.PathLike[str], directions: Directions, info: Mapping[str, Any]) -> None:
    """Writes directions and how they were made into one safetensors file.

    Raises:
        OutputError: The file cannot be written.
    """
    meta = {"architecture": ARCHITECTURE, "kind": directions.kind, "config": directions.config(), **info}
    from ttcfast.runtime import checkpoints  # imported here, since the search works without safetensors

    checkpoints.save(path, directions.state_dict(), meta)


def load_directions(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Directions:
    """Loads directions in evaluation mode; returns the same object while the file is unchanged.

    Raises:
        CheckpointError: The file is missing or damaged, or does not hold directions.
    """
    place = Path(path).absolute()  # the same name means another file after a chdir
    changed = place.stat().st_mtime_ns if place.is_file() else -1
    return _load(str(place), changed, str(device))


@functools.lru_cache(maxsize=8)
def _load(path: str, changed: int, device: str) -> Directions:
    from ttcfast.runtime import checkpoints  # imported here, since the search works without safetensors

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
    """Interpolates standard normals ``[M, r, *grid]`` to smooth fields ``[M, r, *S]`` that are standard normal in each cell."""
    for axis, (cells, wraps) in enumerate(zip(space, periodic)):
        count = nodes.shape[2 + axis]
        if count == 1:
            continue
        weights = _weights(cells, count, wraps, nodes.device).to(nodes.dtype)
        nodes = torch.tensordot(nodes.movedim(2 + axis, -1), weights, ([-1], [1])).movedim(-1, 2 + axis)
    return nodes.expand(*nodes.shape[:2], *space)


def _weights(cells: int, nodes: int, periodic: bool, device: torch.device) -> Tensor:
    """Returns weights ``[cells, nodes]``, quarter waves between neighbours whose squares sum to 1, so that the variance is uniform."""
    place = torch.arange(cells, dtype=torch.float64, device=device) * (nodes / cells if periodic else (nodes - 1) / max(1, cells - 1))
    distance = (place[:, None] - torch.arange(nodes, dtype=torch.float64, device=device)).abs()
    if periodic:
        distance = torch.minimum(distance, nodes - distance)
        if nodes == 2:  # both neighbours are the same node
            return torch.cos(distance * math.pi / 2)
    return torch.where(distance < 1, torch.cos(distance * math.pi / 2), 0.0)


def _padded(x: Tensor, periodic: Sequence[bool]) -> Tensor:
    """Adds a ghost cell at both ends of every space axis of ``[N, C, *S]``: wrapped on periodic axes, edge values elsewhere."""
    for axis, wraps in enumerate(periodic, 2):
        x = _lengthened(x, axis, wraps)
    return x


def _lengthened(x: Tensor, axis: int, wraps: bool) -> Tensor:
    first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
    return torch.cat([last, x, first] if wraps else [first, x, last], axis)


def _neighbours(x: Tensor, axis: int, periodic: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Returns the previous and the next cell along space axis ``axis``."""
    wide, cells = _lengthened(x, axis + 2, periodic[axis]), x.shape[axis + 2]
    return wide.narrow(axis + 2, 0, cells), wide.narrow(axis + 2, 2, cells)


def _laplacian(x: Tensor, periodic: Sequence[bool]) -> Tensor:
    return sum((sum(_neighbours(x, axis, periodic)) - 2 * x for axis in range(len(periodic))), torch.zeros_like(x))


def _smooth(x: Tensor, periodic: Sequence[bool], times: int) -> Tensor:
    """Applies the binomial average (1, 2, 1) / 4 along every axis, ``times`` times."""
    for _ in range(times):
        for axis in range(len(periodic)):
            x = (sum(_neighbours(x, axis, periodic)) + 2 * x) / 4
    return x
