"""Turns a reward model into a scorer: chunking, precision, compilation, and the direction in which the score increases."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttcfast.checks import one_of, whole
from ttcfast.rewards.scorer import ScoreContext, Scorer
from ttcfast.runtime.errors import CheckpointError
from ttcfast.runtime.units import Units, require_units
from ttcfast.spec import StateSpec

from .dense import DensePRM
from .network import PairNetwork
from .sketch_files import load_state_dict_file

REMEDY = "give the reward model that was trained for such data (ttcfast train_prm_on_policy), or leave it out"
MARGIN = 0.2  # the plan's; a network that was trained with another one records it in its info
_CHUNK_BYTES = {"cpu": 2 << 20}  # of one activation; larger ones are allocated anew by each layer, at half the speed (bench/bench_prm.py)
_CHUNK_BYTES_ELSEWHERE = 1 << 30


class PRMScorer(Scorer):
    """Learned reward. Candidates that are not finite score -inf.

    Args:
        prm_ckpt: A ``PRM`` or ``DensePRM``, a folder that ``save_pretrained`` or ``ttcfast train_prm`` wrote, or the plan's ``.pt`` with a
            state dict (only tensors are unpickled).
        in_ch: 2C, checked against the model; None skips the check.
        spec: Layout of the states to score; None means the model's. Its channels must match the model's, and so must gamma and cell volume
            if the model has features that depend on them.
        compile: Whether to score with torch.compile. Each chunk shape compiles once, which takes half a minute or more on a CPU.
        dtype: torch.bfloat16 or torch.float16 runs convolutions under autocast and the head in float32; check how many choices this changes
            with ``bench/bench_prm.py``. None means float32.
        channels_last: Whether to store weights and activations channels last.
        chunk: Candidates scored at once; None bounds one activation by 2 MB on a CPU and 1 GB elsewhere.

    Raises:
        CheckpointError: The model is missing or damaged, or has another ``in_ch`` or other channels than ``spec``.
        DataError: ``spec`` has another gamma or cell volume.
        ValueError: The dtype is unknown, or ``chunk`` is below 1.

    Source: TTC plan, "Minimal Interfaces (Copy-Paste Stubs)"; docs/design/decisions.md ("Process reward model"), ("Precision").
    """

    marks_nonfinite = True
    scores_projected = True  # it is trained on states as rollouts keep them

    def __init__(
        self,
        prm_ckpt: PairNetwork | str | os.PathLike[str],
        in_ch: int | None = None,
        *,
        spec: StateSpec | None = None,
        compile: bool = False,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        one_of("dtype", dtype, (None, torch.float32, torch.bfloat16, torch.float16))
        if chunk is not None:
            whole("chunk", chunk, 1)
        network = _opened(prm_ckpt)
        if in_ch is not None and in_ch != network.in_ch:
            raise CheckpointError(
                f"in_ch is {in_ch} and the reward model {_name(prm_ckpt)} has in_ch {network.in_ch}, for states of {network.channels} "
                "channels; give the reward model that was trained for these states"
            )
        if spec is not None and 2 * spec.num_channels != network.in_ch:
            raise CheckpointError(
                f"spec has {spec.num_channels} channels and the reward model {_name(prm_ckpt)} was trained for {network.channels}; "
                "give the one that was trained for these states"
            )
        if spec is not None and network.residual is not None:
            given = Units("spec", None, spec.cell_volume, spec.gamma)
            require_units(given, network.units(f"the reward model {_name(prm_ckpt)}"), REMEDY)
        self.network = network.eval()
        self.ascent_to_best = isinstance(network, DensePRM)
        self.spec = network.spec if spec is None else spec
        self.dtype, self.channels_last, self.chunk = (None if dtype is torch.float32 else dtype), channels_last, chunk
        if channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._scores = torch.compile(network.score_group, dynamic=False) if compile else network.score_group

    @property
    def timeless(self) -> bool:
        return type(self) is PRMScorer

    def require_fit(self, given: Units, name: str = "the reward model") -> None:
        """Raises ``DataError`` unless it was trained for the time step and cell of ``given``, and gamma if it reads the residual."""
        require_units(given, self.network.units(name), REMEDY)

    def score_group(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        scores = state.new_empty(candidates.shape[:2], dtype=torch.float32)
        for rows, columns, share in self._chunks(state, candidates):
            with self._autocast(state):
                scores[rows, columns] = self._scores(state[rows], candidates[rows, columns], share).to(scores.dtype)
        return _marked(candidates, scores)

    def ascent(self, state: Tensor, candidates: Tensor, context: ScoreContext | None = None) -> Tensor:
        """Returns the displacement that is one full step up the score, ``[N, B, C, X, Y]`` in physical units, detached.

        For a dense model it is the predicted error, after which the model would predict none. For a scalar model it is the shortest
        displacement, in units of ``delta_std``, that raises the linearised score by the margin of its training. 0 where the candidate or
        the displacement is not finite.
        """
        return self.ascent_and_scores(state, candidates, context)[0]

    def ascent_and_scores(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> tuple[Tensor, Tensor]:
        state, candidates = state.detach(), candidates.detach()
        moves = torch.empty_like(candidates)
        scores = state.new_empty(candidates.shape[:2], dtype=torch.float32)
        with torch.no_grad():
            for rows, columns, share in self._chunks(state, candidates):
                move, score = self._move(state[rows], candidates[rows, columns], share)
                moves[rows, columns], scores[rows, columns] = move.detach().to(moves.dtype), score.detach().to(scores.dtype)
        finite = (moves.isfinite() & candidates.isfinite()).flatten(2).all(2)
        return torch.where(finite.reshape(*finite.shape, 1, 1, 1), moves, 0.0), _marked(candidates, scores)

    def units(self, state: Tensor) -> Tensor:
        norm = self.network.normalizer
        return state.new_ones(()) if norm is None else norm.delta_std.to(state).reshape(-1, 1, 1)

    def _move(self, state: Tensor, candidates: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        network, scale = self.network, self.units(state)
        if isinstance(network, DensePRM):
            with self._autocast(state):
                field = network.error_group(state, candidates, share)
            return field * scale, network.score_of(field)
        with torch.enable_grad():
            at = candidates.clone().requires_grad_()
            with self._autocast(state):
                scores = network.score_group(state, at, share)
            (slope,) = torch.autograd.grad(scores.sum(), at)  # each score depends on its own candidate only
        slope = slope * scale
        square = slope.square().sum((2, 3, 4), keepdim=True)
        margin = float(network.info.get("margin", MARGIN))
        return torch.where(square > 0, margin * slope / square.clamp_min(torch.finfo(square.dtype).tiny), 0.0) * scale, scores

    def _chunks(self, state: Tensor, candidates: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yields rows and columns of the candidates to compute at once, and the first layer's response to their states."""
        n, b = candidates.shape[:2]
        most = self.chunk
        if most is None:
            each = 4 * self.network.first_layer.out_channels * state.shape[-2:].numel()
            most = max(1, _CHUNK_BYTES.get(state.device.type, _CHUNK_BYTES_ELSEWHERE) // each)
        states, width = max(1, most // b), min(most, b)
        for first in range(0, n, states):
            rows = slice(first, min(first + states, n))
            with self._autocast(state):
                share = self.network.state_share(self._laid_out(state[rows]))
            for column in range(0, b, width):
                yield rows, slice(column, min(column + width, b)), share

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def _autocast(self, x: Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)


def _marked(candidates: Tensor, scores: Tensor) -> Tensor:
    return torch.where(candidates.isfinite().flatten(2).all(2) & scores.isfinite(), scores, -torch.inf)


def _opened(prm: Any) -> PairNetwork:
    if isinstance(prm, PairNetwork):
        return prm
    if not isinstance(prm, (str, os.PathLike)):
        raise ValueError(f"prm_ckpt is a {type(prm).__name__}; give a PRM or DensePRM, a folder of save_pretrained, or a .pt")
    return PairNetwork.from_pretrained(prm) if Path(prm).is_dir() else load_state_dict_file(prm)


def _name(prm: Any) -> str:
    return type(prm).__name__ if isinstance(prm, PairNetwork) else str(prm)
