"""Compact indices of trajectories in files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import numpy as np


class Picks:
    """Sequence of (file, trajectory) indices, stored as runs of consecutive trajectories so that memory grows with the runs alone.

    Args:
        runs: (file, first trajectory, count) of each run, in order.
    """

    def __init__(self, runs: Iterable[tuple[int, int, int]]) -> None:
        self.runs = tuple(run for run in runs if run[2] > 0)
        self._ends = list(accumulate(count for _, _, count in self.runs))

    @classmethod
    def of(cls, index: Iterable[tuple[int, int]]) -> Picks:
        """Return ``index`` with consecutive trajectories joined into runs."""
        if isinstance(index, Picks):
            return index
        runs: list[tuple[int, int, int]] = []
        for file, i in index:
            before, first, count = runs[-1] if runs else (-1, 0, 0)
            if before == file and first + count == i:
                runs[-1] = (file, first, count + 1)
            else:
                runs.append((file, i, 1))
        return cls(runs)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((file, i) for file, first, count in self.runs for i in range(first, first + count))

    def part(self, start: int, stop: int) -> Picks:
        """Return picks ``start`` to ``stop - 1``."""
        cut = []
        for (file, first, count), end in zip(self.runs, self._ends, strict=True):
            low, high = max(start, end - count), min(stop, end)
            cut.append((file, first + low - (end - count), high - low))
        return Picks(cut)

    def __getitem__(self, i: int) -> tuple[int, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"pick {i} of {len(self)}")
        i %= len(self)
        run = bisect_right(self._ends, i)
        file, first, count = self.runs[run]
        return file, first + i - (self._ends[run] - count)

    def in_turn(self, wanted: Iterable[int]) -> list[int]:
        """Return the positions of picks in round-robin order: the first of each file, then the second of each, and so on.

        Args:
            wanted: Ranks in that order; consecutive ranks are fastest.
        """
        ranges: dict[int, list[range]] = {}
        for (file, _, count), end in zip(self.runs, self._ends, strict=True):
            ranges.setdefault(file, []).append(range(end - count, end))
        lengths = np.array([sum(map(len, held)) for held in ranges.values()], dtype=np.int64)
        ends = [list(accumulate(map(len, held))) for held in ranges.values()]
        found: list[int] = []
        start, turn = 0, list[int]()
        for k in wanted:
            if not start <= k < start + len(turn):
                # The largest number of whole turns with at most k picks.
                turns = bisect_right(range(int(lengths.max()) + 1), k, key=lambda n: int(np.minimum(lengths, n).sum())) - 1
                start = int(np.minimum(lengths, turns).sum())
                turn = sorted(_nth(held, upto, turns) for held, upto in zip(ranges.values(), ends, strict=True) if upto[-1] > turns)
            found.append(turn[k - start])
        return found


def _nth(ranges: Sequence[range], ends: Sequence[int], n: int) -> int:
    """Return entry ``n`` of the concatenated ranges; ``ends`` are their cumulative lengths."""
    held = bisect_right(ends, n)
    return ranges[held][n - (ends[held - 1] if held else 0)]
