"""Defines the targets of a group and checks rows against them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .rows import OK, Row


@dataclass(frozen=True)
class Target:
    """A bound on one column.

    Args:
        case: Names of the cases it applies to, with wildcards ``*`` and ``?``.
        peer: Names of the peers it applies to, likewise; ``""`` for our own row.
        column: Column of ``bench.rows.Row``, such as ``"ratio"``, ``"share_of_copy"`` or ``"graph_hot_us"``.
        least: Lower bound, or None.
        most: Upper bound, or None.
        device: ``"cpu"`` or ``"cuda"``.
        threads: Number of threads it applies to.
        stretch: More ambitious bound, printed next to the first.
    """

    case: str
    peer: str
    column: str
    least: float | None = None
    most: float | None = None
    device: str = "cpu"
    threads: int = 1
    stretch: float | None = None

    def __post_init__(self) -> None:
        if (self.least is None) == (self.most is None):
            raise ValueError(f"target {self.case}/{self.column} has least {self.least} and most {self.most}; give exactly one")

    @property
    def bound(self) -> str:
        text = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        return text if self.stretch is None else f"{text} (stretch {self.stretch:g})"

    def met_by(self, value: float) -> bool:
        return value >= self.least if self.least is not None else value <= (self.most or 0.0)

    def measured(self, rows: Sequence[Row]) -> Iterator[tuple[Row, float]]:
        """Yield the rows that the target applies to, with their values."""
        for row in rows:
            ours = row.peer == row.ours
            named = ours if not self.peer else not ours and fnmatchcase(row.peer, self.peer)
            if row.status != OK or not named or (row.device, row.threads) != (self.device, self.threads):
                continue
            value = getattr(row, self.column)
            if fnmatchcase(row.case, self.case) and value is not None:
                yield row, value
