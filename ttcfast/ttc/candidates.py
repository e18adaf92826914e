"""The candidates of a step, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ttcfast.spec import TTCConfig

from .models import Source


class Chunks:
    """Draws the candidates of a step in chunks that all have the same number of problems and candidates, fixed when a rollout starts.

    Where ``cfg.chunk_size`` or ``cfg.memory_budget`` is set, or the source wants fixed shapes, a chunk that would be smaller (the last of a
    group, problems that are drawn again, those left when others are frozen) is filled up, and what fills it is thrown away. The model's
    matrix products then have one shape, so that a candidate does not depend on the chunk that it is in, to the last bit where the
    products treat their rows alike, and nothing is compiled anew. Sources that draw in their own way are never given more than was asked
    for.

    Args:
        source: of candidates.
        cfg: branching factor, limits, seed.
        window: states from which the rollout starts, ``[n, C, *S]`` (``[n, h, C, *S]`` with history).
        include_deterministic: candidate 0 is the deterministic step.
        whole_groups: all candidates of a problem in one chunk, for a scorer that compares them.
        measure: gives the bytes that a candidate takes (``ttcfast.ttc.memory``); asked only where ``cfg.memory_budget`` is set.
        rows: states that a step leaves at most, problems times beams; None is ``len(window)``.
        share: (rank, ranks): of a step's chunks, which are counted from 0, those whose number is ``rank`` modulo ``ranks`` are drawn here.

    Raises:
        ValueError: whole groups do not fit into a chunk, or no candidate into the memory budget.
    """

    def __init__(
        self,
        source: Source,
        cfg: TTCConfig,
        window: Tensor,
        *,
        include_deterministic: bool,
        whole_groups: bool,
        measure: Callable[[], int],
        rows: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._source, self._cfg, self._deterministic, self._whole = source, cfg, include_deterministic, whole_groups
        self._first, width, n = int(include_deterministic), cfg.branching_factor, len(window) if rows is None else rows
        self._rank, self._ranks = share
        limit = chunk_limit(cfg, measure)
        self._fixed = source.keyed and (limit is not None or source.fixed_shapes)
        self._problems: int | None = None  # all there are
        self._at_once = max(1, width - self._first)
        if limit is None and not self._fixed:
            if whole_groups and self._ranks > 1:
                self._problems = -(-n // self._ranks)
            elif not whole_groups:
                self._at_once = -(-self._at_once // self._ranks)
            return
        limit = n * width if limit is None else limit
        if whole_groups and limit < width:
            raise ValueError(
                f"a chunk holds {limit} candidates but the scorer needs a step's {width} together; raise chunk_size or memory_budget"
            )
        self._problems = min(n, limit // width if whole_groups else limit)
        if not whole_groups:
            self._at_once = min(self._at_once, limit // self._problems)

    def of_step(
        self, window: Tensor, problem_ids: Tensor, step: int, again: int, beams: Tensor | None = None
    ) -> Iterator[tuple[slice, int, Tensor]]:
        """Candidates ``[m, b, C, *S]`` of a block of problems, from a position in their groups on; ``again`` counts redrawn groups, which
        have no deterministic candidate, and ``beams`` int64 ``[n]`` says which beam of its problem each state is (None: its only one)."""
        beams = torch.zeros_like(problem_ids) if beams is None else beams
        for number, (rows, start) in enumerate(self._plan(len(window), again)):
            if number % self._ranks != self._rank:
                continue
            x = window[rows]
            if start == 0 and self._deterministic and not self._whole:
                yield rows, 0, self.deterministic(x).unsqueeze(1)
                continue
            parts = [self.deterministic(x).unsqueeze(1)] if start == 0 and self._deterministic else []
            first = max(start, self._first)
            if self._cfg.branching_factor > first:
                parts.append(self._sample(x, problem_ids[rows], beams[rows], step, again, first))
            yield rows, start, parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _plan(self, n: int, again: int) -> Iterator[tuple[slice, int]]:
        """The chunks of a step of ``n`` states: their rows, and the position of their first candidate."""
        with_deterministic, width = self._deterministic and again == 0, self._cfg.branching_factor
        for rows in self._blocks(n):
            if self._whole:
                yield rows, 0 if with_deterministic else self._first
                continue
            if with_deterministic:  # right before the candidates of the same states, which a low-precision surrogate corrects by it
                yield rows, 0
            yield from ((rows, start) for start in range(self._first, width, self._at_once))

    @property
    def size(self) -> int | None:
        """Candidates of a chunk where that is fixed, else None."""
        return None if not self._fixed else (self._problems or 1) * self._at_once

    def deterministic(self, window: Tensor) -> Tensor:
        """The deterministic step of ``[m, C, *S]``, in blocks of the fixed size."""
        parts = [self._source.deterministic(self._filled(window[rows]))[: rows.stop - rows.start] for rows in self._blocks(len(window))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def continued(self, window: Tensor) -> Tensor:
        """The deterministic step of a chunk's candidates, ``[m b, C, *S]``, filled up to a whole chunk's number."""
        return self._source.deterministic(_filled(window, self.size or 0))[: len(window)]

    def again(self, window: Tensor, problem_ids: Tensor, beams: Tensor, positions: Tensor, step: int, again: int) -> Tensor:
        """Candidates ``[m, C, *S]`` once more, one of each state, at positions ``[m]``. Only a keyed source makes the same.

        They come in parts of a chunk's number of candidates.
        """
        size = self.size or len(window)
        ids = self.id_of(0, again) + beams * self._cfg.branching_factor + positions
        made = []
        for x, problem, own in zip(window.split(size), problem_ids.split(size), ids.split(size)):
            count, given = len(x), [_filled(v, self.size or 0) for v in (x, problem, own)]
            drawn = self._source.candidates(given[0], given[2].cpu().unsqueeze(1), given[1], seed=self._cfg.seed, step=step)
            made.append(drawn[:count, 0])
        first = (positions == 0).nonzero().flatten() if self._deterministic and again == 0 else positions[:0]
        out = torch.cat(made)
        if len(first):
            out[first] = self.deterministic(window[first])
        return out

    def id_of(self, position: int, again: int) -> int:
        """A candidate drawn again at the same position is another candidate, and so is one of another beam: beam j's come
        ``j * branching_factor`` later."""
        return again * self._cfg.beam_width * self._cfg.branching_factor + position

    def _sample(self, window: Tensor, problem_ids: Tensor, beams: Tensor, step: int, again: int, start: int) -> Tensor:
        m, count = len(window), min(self._at_once, self._cfg.branching_factor - start)
        ids = torch.arange(self._at_once if self._fixed else count) + self.id_of(start, again)
        if self._cfg.beam_width > 1:
            ids = self._filled(beams).cpu().unsqueeze(1) * self._cfg.branching_factor + ids
        seed = self._cfg.seed
        return self._source.candidates(self._filled(window), ids, self._filled(problem_ids), seed=seed, step=step)[:m, :count]

    def _filled(self, values: Tensor) -> Tensor:
        """With the last entry repeated up to the fixed number of problems."""
        return _filled(values, (self._problems or 0) if self._fixed else 0)

    def _blocks(self, n: int) -> list[slice]:
        size = self._problems or n
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _filled(values: Tensor, size: int) -> Tensor:
    """With the last entry repeated up to ``size``."""
    missing = size - len(values)
    return values if missing <= 0 else torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])


def chunk_limit(cfg: TTCConfig, measure: Callable[[], int]) -> int | None:
    """Candidates that one chunk may hold; None for no limit.

    Raises:
        ValueError: the memory budget is below one candidate.
    """
    by_memory = None
    if cfg.memory_budget is not None:
        each = measure()
        by_memory = cfg.memory_budget // each
        if by_memory < 1:
            raise ValueError(
                f"memory_budget is {cfg.memory_budget} bytes and generating and scoring one candidate takes {each}; give at least that"
            )
        by_memory = 1 << (by_memory.bit_length() - 1)  # what is measured varies by a page or two; the chunks should not
    limits = [v for v in (cfg.chunk_size, by_memory) if v is not None]
    return min(limits) if limits else None
