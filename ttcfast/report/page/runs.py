"""Discovery and reading of run folders."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ttcfast.pwm.policy_result import PolicyResult, read_result
from ttcfast.report.policies import in_order
from ttcfast.runtime.errors import ArgumentError, DataError
from ttcfast.runtime.files import entries, parse_json, require_regular
from ttcfast.runtime.logs import read_log

T = TypeVar("T")
_MARKS = ("metrics.json", "summary.csv", "table.csv", "config.json", "log.jsonl")
_EVALUATIONS = ("run_ttc", "demo")  # commands whose runs are nothing before their metrics.json is there
_RESULTS = ("result.json", "*/result.json", "*/*/result.json")  # of a train_policy, a task of a protocol, a protocol
_DEEPEST = 3  # a multirun's folders lie at most so far below the folder that is named: date, time, number


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder.

    Args:
        folder: The run folder.
        name: Short name, unique on a page.
        metrics: Contents of ``metrics.json``; {} if the run wrote none.
        provenance: Configuration, versions, random seeds and so on; {} if none was kept.
        family: Folder of a multirun that was named in place of this run; None if this run was named.
        log: Entries of ``log.jsonl``, only for runs that do not compare methods.
        tables: Rows of the CSV tables by file name, only for runs that do not compare methods.
        policies: Results of the finished runs of a ``protocol``, or the one of a ``train_policy``.
    """

    folder: Path
    name: str
    metrics: Mapping[str, Any]
    provenance: Mapping[str, Any]
    family: Path | None = None
    log: Sequence[Mapping[str, Any]] = ()
    tables: Mapping[str, list[dict[str, str]]] = field(default_factory=dict)
    policies: Sequence[PolicyResult] = ()

    @property
    def compares_methods(self) -> bool:
        """Whether this is a run of ``run_ttc`` or ``demo``."""
        return "methods" in self.metrics

    @property
    def config(self) -> dict[str, Any]:
        """The configuration by dotted keys."""
        return flat(self.provenance.get("config") or {})


def load(folders: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Return the runs in ``folders``, and notes about those left out.

    A folder that contains runs (a multirun) stands for all of them; those without numbers yet are left out and named in the notes.

    Raises:
        ArgumentError: A folder is named twice.
        DataError: A folder is missing, not a run, without numbers yet, or damaged.
    """
    found: dict[Path, Path | None] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}; give folders that ttcfast demo, run_ttc or train_* wrote")
        inside = [(folder, None)] if _is_run(folder) else [(child, folder) for child in _runs_below(folder)]
        if not inside:
            raise DataError(
                f"{folder} is no run: it holds no readable metrics.json, table or log, nor do the folders in it; give a folder that "
                "ttcfast demo, run_ttc or train_* wrote"
            )
        for run, family in inside:
            place = run.resolve()
            if any(place == other.resolve() for other in found):
                raise ArgumentError(f"runs names {run} twice; name every run once")
            found[run] = family
    waiting = {run: missing for run in found if (missing := _lacks(run)) is not None}
    if told := next((run for run in waiting if found[run] is None), None):
        raise DataError(f"{told} {waiting[told]}: it is still running or was stopped; wait for it, or make it again")
    notes = [f"{run} was left out: it {missing}." for run, missing in waiting.items()]
    there = [run for run in found if run not in waiting]
    if not there:
        raise DataError(f"none of the runs in {', '.join(map(str, folders))} has numbers yet; wait for one")
    return [_open(run, name, found[run]) for run, name in zip(there, short_names(there), strict=True)], notes


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, preceded by as many parts as are needed to make it unique."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        others = [p for p in parts if p != own]
        length = next(n for n in range(1, len(own) + 1) if n == len(own) or all(p[-n:] != own[-n:] for p in others))
        names.append("/".join(own[-length:]).replace("//", "/"))
    return names


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + str(key): value}
    return out


def _is_run(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS) or bool(_records(folder))


def _runs_below(folder: Path, depth: int = 1) -> list[Path]:
    runs: list[Path] = []
    for child in sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=_numbers_in_order):
        runs += [child] if _is_run(child) else _runs_below(child, depth + 1) if depth < _DEEPEST else []
    return runs


def _numbers_in_order(path: Path) -> tuple[int, str]:
    return (int(path.name), "") if path.name.isdecimal() else (-1, path.name)


def _lacks(folder: Path) -> str | None:
    """Say what a run folder lacks so far; None if it can be shown."""
    if (folder / "metrics.json").is_file():
        return None
    if _evaluates(folder):
        return "has no metrics.json yet"
    return None if read_log(folder) or any(_tables_of(folder)) or _policies(folder) else "has no numbers yet"


def _evaluates(folder: Path) -> bool:
    return any((folder / f"{command}.provenance.json").is_file() for command in _EVALUATIONS)


def _open(folder: Path, name: str, family: Path | None) -> Run:
    metrics = _json(folder / "metrics.json") if (folder / "metrics.json").is_file() else {}
    provenance = metrics.get("provenance") or _provenance(folder)
    if not isinstance(provenance, Mapping):
        raise DataError(f"{folder / 'metrics.json'} is damaged or of another version (its provenance is no mapping); make the run again")
    if "methods" in metrics:
        return Run(folder, name, metrics, provenance, family)
    if _evaluates(folder):
        raise DataError(f"{folder / 'metrics.json'} is damaged or of another version (it has no methods); make the run again")
    log, tables = guarded(folder, read_log, folder), guarded(folder, _read_tables, folder)
    return Run(folder, name, metrics, provenance, family, log, tables, _policies(folder))


def _policies(folder: Path) -> list[PolicyResult]:
    """Return the results of the policies trained in or below a folder, those of each task and arm by random seed."""
    found = []
    for path in (path for pattern in _RESULTS for path in sorted(folder.glob(pattern))):
        held = _json(path).get("result")
        if isinstance(held, Mapping) and "mode" in held:  # not of a train_wm, whose results have this name, too
            found.append(read_result(path))
    return in_order(run for run in found if run is not None)


def guarded(folder: Path, read: Callable[..., T], *arguments: Any) -> T:
    """Call ``read(*arguments)`` and turn the errors of a damaged or foreign file into ``DataError``."""
    try:
        return read(*arguments)
    except OSError as error:
        raise DataError(f"{folder} holds a file that cannot be read ({error.strerror or error}); make it readable") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, csv.Error) as error:
        text = f"{type(error).__name__}: {error}"
        raise DataError(f"the numbers of {folder} are damaged or of another version ({text}); make the run again") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        held = parse_json(require_regular(path, "record", "make the run again").read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path.parent} holds no readable {path.name} ({error.strerror}); make it readable") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged or of another version ({error}); make the run again") from error
    if not isinstance(held, dict):
        raise DataError(f"{path} is damaged or of another version (no mapping); make the run again")
    return held


def _records(folder: Path) -> list[Path]:
    """Return the provenance files of a folder, except that of ``report``, which may write into a run folder."""
    return sorted(p for p in folder.glob("*provenance.json") if p.name != "report.provenance.json")


def _provenance(folder: Path) -> dict[str, Any]:
    kept = _records(folder) or [p for p in (folder / "config.json",) if p.is_file()]
    return _json(kept[0]) if kept else {}


def _tables_of(folder: Path) -> list[Path]:
    return [p for p in entries(folder, ".csv") if p.name not in ("log.csv", "report.csv")]


def _read_tables(folder: Path) -> dict[str, list[dict[str, str]]]:
    tables = {}
    for path in _tables_of(folder):
        with open(require_regular(path, "table", "make the run again"), encoding="utf-8", newline="") as file:
            tables[path.name] = [{k: v for k, v in row.items() if k is not None and isinstance(v, str)} for row in csv.DictReader(file)]
    return tables
