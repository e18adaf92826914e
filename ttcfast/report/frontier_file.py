"""What a run leaves of its compute frontier."""

from __future__ import annotations

from pathlib import Path

from ttcfast.evaluation.frontier import Frontier
from ttcfast.runtime.files import write_csv

from .figures import save
from .figures.error_evaluations import error_against_evaluations
from .figures.style import remove

FILE = "frontier.csv"
FIGURE = "figures/frontier.png"


def write_frontier(out: Path, frontier: Frontier) -> Path:
    """Write ``frontier.csv``, one row per search, reward and number of evaluations, and the figure, whose path is returned."""
    write_csv(out / FILE, frontier.rows())
    save(error_against_evaluations(frontier), out / FIGURE)
    return out / FIGURE


def remove_frontier(out: Path) -> None:
    """Remove what an earlier run in this folder has left."""
    (out / FILE).unlink(missing_ok=True)
    remove(out / FIGURE)
