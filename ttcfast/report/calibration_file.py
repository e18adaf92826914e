"""Files of a calibration: what the rewards' scores are worth beside the candidates' true errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ttcfast.evaluation.calibration import CandidateScores
from ttcfast.runtime.files import write_csv, write_json

from .figures import calibration_figure, calibration_rows, save
from .figures.calibration_buckets import comparable
from .figures.style import remove

FILE = "calibration.json"
TABLE = "calibration.csv"
FIGURE = "figures/calibration.png"


def write_calibration(out: Path, found: CandidateScores) -> list[Path]:
    """Write scores and errors (``calibration.json``, what is not finite as null), the table of their buckets and the figure.

    A reward without a usable score is in the first file alone.

    Returns:
        The figure's path; nothing where there is none.

    Raises:
        OutputError: a file cannot be written.
    """
    remove_calibration(out)  # of an earlier run in this folder, which may have had a usable score where this one has none
    held: dict[str, Any] = {"problems": found.problems, "steps": found.steps, "errors": found.errors, "scores": dict(found.scores)}
    write_json(out / FILE, held)
    usable = {name: given for name, given in found.scores.items() if comparable(given, found.errors)}
    if not usable:
        return []
    write_csv(out / TABLE, calibration_rows(usable, found.errors))
    save(calibration_figure(usable, found.errors), out / FIGURE, dpi=100)  # up to five rows: at 150 the run would wait for it
    return [out / FIGURE]


def remove_calibration(out: Path) -> None:
    """Remove what an earlier run in this folder has left."""
    for name in (FILE, TABLE):
        (out / name).unlink(missing_ok=True)
    remove(out / FIGURE)
