"""Draws the candidates of a step, one chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ttcfast.spec import TTCConfig
from ttcfast.transfer import sent

from .models import Source
from .paths import Beams


class _Given(NamedTuple):
    """States of which candidates are drawn together, filled up; ids are on the host."""

    rows: slice
    own: int  # states that were not filled in
    window: Tensor
    problem_ids: Tensor
    beam: Tensor


class Chunks:
    """Draws the candidates of a step in chunks of one size, fixed when a rollout starts.

    Where the size is limited, or the source wants fixed shapes, a chunk that would be smaller (the last of a group, problems drawn again,
    those left when others are frozen) is filled up and the filling is thrown away. The model's matrix products then have one shape, so
    that a candidate does not depend on its chunk, to the last bit where the products treat their rows alike, and nothing is compiled anew.
    Sources that draw in sequence are never asked for more than is needed.

    The deterministic step is one of the first chunk's candidates where the source is ``joint``, so that it costs no call of its own, and
    a chunk of its own elsewhere. Particles, which are made again to the last bit, have it apart.

    Args:
        source: Source of the candidates.
        cfg: Configuration; the branching factor, the beam width and the seed are used.
        rows: Largest number of states that a step leaves, problems times beams.
        limit: Largest number of candidates in a chunk; None for no limit.
        include_deterministic: Candidate 0 is the deterministic step.
        whole_groups: All candidates of a state come in one chunk, for a scorer that compares them.
        share: (rank, ranks): of a step's chunks, counted from 0, those whose number is ``rank`` modulo ``ranks`` are drawn here.

    Raises:
        ValueError: A whole group does not fit into a chunk.
    """

    def __init__(
        self,
        source: Source,
        cfg: TTCConfig,
        rows: int,
        limit: int | None = None,
        *,
        include_deterministic: bool,
        whole_groups: bool,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._source, self._cfg, self._deterministic, self._whole = source, cfg, include_deterministic, whole_groups
        self._first, width = int(include_deterministic), cfg.branching_factor
        self._joint = include_deterministic and source.joint and cfg.approach != "particle"
        self._rank, self._ranks = share
        self.limit = limit
        self._fixed = source.keyed and (limit is not None or source.fixed_shapes)
        self._problems: int | None = None  # all there are
        self._at_once = width if self._joint else max(1, width - self._first)
        if limit is None and not self._fixed:
            if whole_groups and self._ranks > 1:
                self._problems = -(-rows // self._ranks)
            elif not whole_groups:
                self._at_once = -(-self._at_once // self._ranks)
            return
        limit = rows * width if limit is None else limit
        if whole_groups and limit < width:
            raise ValueError(
                f"a chunk holds {limit} candidates but the scorer needs a step's {width} together; raise chunk_size or memory_budget"
            )
        self._problems = min(rows, limit // width if whole_groups else limit)
        if not whole_groups:
            self._at_once = min(self._at_once, limit // self._problems)

    def of_step(self, beams: Beams, step: int, again: int) -> Iterator[tuple[slice, int, Tensor]]:
        """Draw the candidates of a step.

        Args:
            beams: The states being left.
            step: Index of the step.
            again: Number of times these groups have been drawn before; groups drawn again have no deterministic candidate.

        Yields:
            The rows of ``beams``, the position of the first candidate in their groups, and the candidates ``[m, b, C, *S]``.
        """
        given: _Given | None = None
        for number, (rows, start) in enumerate(self._plan(len(beams), again)):
            if number % self._ranks != self._rank:
                continue
            if given is None or given.rows != rows:  # the same memory for all chunks of these states, by which a surrogate knows them
                given = self._given(beams, rows)
            alone = self._cfg.branching_factor == 1 or not (self._whole or (self._joint and self._at_once > 1))
            if alone and self._deterministic and start == 0:
                yield rows, 0, self._still(given, step).unsqueeze(1)
            else:
                yield rows, start, self._sample(given, step, again, start)

    def _plan(self, n: int, again: int) -> Iterator[tuple[slice, int]]:
        """Return the rows of each chunk of a step of ``n`` states, and the position of its first candidate."""
        with_deterministic, width = self._deterministic and again == 0, self._cfg.branching_factor
        for rows in self._blocks(n):
            if self._whole:
                yield rows, 0 if with_deterministic else self._first
                continue
            joint = with_deterministic and self._joint
            if with_deterministic and not joint:  # immediately before the candidates that a low-precision surrogate corrects with it
                yield rows, 0
            yield from ((rows, start) for start in range(0 if joint else self._first, width, self._at_once))

    @property
    def size(self) -> int | None:
        """Number of candidates in a chunk where it is fixed, else None."""
        return None if not self._fixed else (self._problems or 1) * self._at_once

    def deterministic(self, beams: Beams, step: int) -> Tensor:
        """The deterministic step of beams, ``[m, C, *S]``, in blocks of the fixed size."""
        parts = [self._still(self._given(beams, rows), step) for rows in self._blocks(len(beams))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def continued(self, window: Tensor, problem_ids: Tensor, step: int) -> Tensor:
        """The deterministic step of the candidates of a chunk, ``[m * b, C, *S]``, filled up to a whole chunk; ids are on the host."""
        size = self.size or 0
        return self._source.deterministic(_filled(window, size), _filled(problem_ids, size), step=step)[: len(window)]

    def again(self, beams: Beams, positions: Tensor, step: int, again: int) -> Tensor:
        """Draw candidates ``[m, C, *S]`` once more, one of each beam at ``positions [m]``, which are on the host.

        Only a keyed source draws the same ones.
        """
        size, fill, known = self.size or len(beams), self.size or 0, beams.known
        ids = self.id_of(0, again) + known.beam * self._cfg.branching_factor + positions
        made = []
        for start in range(0, len(beams), size):
            part = slice(start, start + size)
            given = [_filled(values[part], fill) for values in (beams.window, ids, known.problem_ids)]
            drawn = self._source.candidates(given[0], given[1].unsqueeze(1), given[2], seed=self._cfg.seed, step=step)
            made.append(drawn[: len(ids[part]), 0])
        first = (positions == 0).nonzero().flatten() if self._deterministic and again == 0 else positions[:0]
        out = torch.cat(made)
        if len(first):
            out[sent(first, out.device)] = self.deterministic(beams.rows(first), step)
        return out

    def id_of(self, position: int, again: int) -> int:
        """Id of the candidate of beam 0 at a position; those of beam j follow ``j * branching_factor`` later.

        A candidate drawn again at the same position has another id.
        """
        return again * self._cfg.beam_width * self._cfg.branching_factor + position

    def ids_of(self, beams: Beams, positions: Tensor, again: int) -> Tensor:
        """Ids ``[m, b]`` of the candidates of beams at ``positions [b]`` or ``[m, b]``, on the host; the deterministic step has id 0."""
        ids = self.id_of(0, again) + beams.known.beam.unsqueeze(1) * self._cfg.branching_factor + positions
        return torch.where(positions == 0, 0, ids) if self._deterministic and again == 0 else ids

    def cost(self, beams: Beams, start: int, count: int, again: int) -> tuple[int, int]:
        """Model evaluations and steps of classical solvers of a chunk: ``count`` candidates of each beam from position ``start``."""
        if not self._source.mixed:
            return len(beams) * count, 0
        ids = self.ids_of(beams, torch.arange(start, start + count), again)
        first = int(self._deterministic and start == 0)  # drawn by itself
        found = [self._source.cost(part) for part in (ids[:, :first], ids[:, first:]) if part.shape[1]]
        return sum(evaluations for evaluations, _ in found), sum(steps for _, steps in found)

    def _still(self, given: _Given, step: int) -> Tensor:
        """The deterministic step of some states."""
        return self._source.deterministic(given.window, given.problem_ids, step=step)[: given.own]

    def _sample(self, given: _Given, step: int, again: int, start: int) -> Tensor:
        """A chunk's candidates from position ``start``, of which 0 is the deterministic step where that is included."""
        first, width = max(start, self._first), self._cfg.branching_factor
        end = width if self._whole else min(start + self._at_once, width)
        ids = torch.arange(first, start + self._at_once if self._fixed and not self._whole else end, device=given.beam.device)
        ids = ids + self.id_of(0, again)
        if self._cfg.beam_width > 1:
            ids = given.beam.unsqueeze(1) * self._cfg.branching_factor + ids
        drawn = self._source.group if first > start else self._source.candidates
        return drawn(given.window, ids, given.problem_ids, seed=self._cfg.seed, step=step)[: given.own, : end - start]

    def _given(self, beams: Beams, rows: slice) -> _Given:
        """The states ``rows`` and who they are, with the last one repeated up to the fixed number of problems."""
        size, known = (self._problems or 0) if self._fixed else 0, beams.known
        columns = (_filled(values[rows], size) for values in (beams.window, known.problem_ids, known.beam))
        return _Given(rows, rows.stop - rows.start, *columns)

    def _blocks(self, n: int) -> list[slice]:
        size = self._problems or n
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _filled(values: Tensor, size: int) -> Tensor:
    """Return ``values`` with the last entry repeated up to ``size``."""
    missing = size - len(values)
    return values if missing <= 0 else torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])
