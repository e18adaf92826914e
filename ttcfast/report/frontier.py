"""What a run leaves of its compute frontier."""

from __future__ import annotations

from pathlib import Path

from ttcfast.runtime.files import write_csv
from ttcfast.ttc.frontier import Frontier

from .figures import save
from .figures.frontier import error_against_evaluations


def write_frontier(out: Path, frontier: Frontier) -> Path:
    """Write ``frontier.csv``, one row per search, reward and number of evaluations, and the figure, whose path is returned."""
    write_csv(out / "frontier.csv", frontier.rows())
    path = out / "figures" / "frontier.png"
    save(error_against_evaluations(frontier), path)
    return path
