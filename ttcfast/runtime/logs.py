"""Logs a run as one JSON line and one CSV row per entry, and optionally to TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .drawing import import_matplotlib
from .errors import MissingPackageError
from .files import append, atomic_write, output_folder, parse_json, require_regular, strict, write_csv
from .locks import run_lock


class RunLog:
    """Log of a run, written entry by entry so that a killed run leaves its log.

    Args:
        folder: Receives ``log.jsonl`` and ``log.csv``, and the folders ``tensorboard`` and ``wandb`` if requested.
        tensorboard: Whether to write TensorBoard events, too.
        wandb: Also log to Weights & Biases, offline (``wandb sync`` uploads): a project name, or the keyword
            arguments of ``wandb.init``.
        config: The run's configuration, shown by W&B.
        resume_step: None starts a new log. A step continues the one in ``folder``: entries after that step are dropped, since the run
            resumed from it will write them again.

    Raises:
        MissingPackageError: TensorBoard or W&B was requested and is not installed; the message names the pip extra.
        OutputError: The folder cannot be written, or another run is logging there.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tensorboard: bool = False,
        wandb: str | Mapping[str, Any] | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ):
        self.folder = output_folder(folder)
        with contextlib.ExitStack() as lock:
            lock.enter_context(run_lock(self.folder))
            # First, so that a missing package raises before the old log is modified.
            self._board = _tensorboard(self.folder / "tensorboard", resume_step) if tensorboard else None
            self._wandb = _wandb(self.folder, wandb, config) if wandb else None
            kept = [] if resume_step is None else [entry for entry in read_log(self.folder) if entry["step"] <= resume_step]
            with atomic_write(self.folder / "log.jsonl") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in kept)
            self._rows = [_scalars(entry) for entry in kept]
            self._columns = list(dict.fromkeys(key for row in self._rows for key in row))
            write_csv(self.folder / "log.csv", self._rows)
            self._lock = lock.pop_all()  # held until the log is closed or garbage collected

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Add one entry: numbers and strings by name, at ``step``. Non-finite numbers are written as null."""
        self._write({"step": step, **strict(values)})
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        if self._board is not None:
            for name, number in numbers.items():
                self._board.add_scalar(name, number, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def histogram(self, name: str, values: Iterable[float], step: int, bins: int = 20) -> None:
        """Add the distribution of ``values`` (the finite ones): as counts and edges in the JSON line, as a histogram elsewhere."""
        flat = torch.as_tensor(values if torch.is_tensor(values) else list(values), dtype=torch.float64).flatten()
        flat = flat[flat.isfinite()]
        if flat.numel() == 0:
            self._write({"step": step, name: {"counts": [], "edges": []}})
            return
        counts, edges = torch.histogram(flat, bins=bins)
        self._write({"step": step, name: {"counts": [int(c) for c in counts], "edges": edges.tolist()}})
        if self._board is not None:
            self._board.add_histogram(name, flat, step)
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Histogram(flat.tolist(), num_bins=bins)}, step=step)

    def figure(self, name: str, path: str | os.PathLike[str], step: int = 0) -> None:
        """Show the picture at ``path`` (PNG) in TensorBoard and W&B; the JSON line names the file."""
        self._write({"step": step, name: os.fspath(path)})
        if self._board is not None:
            import_matplotlib()
            from matplotlib.image import imread

            require_regular(path, "figure", "draw it before it is shown")
            self._board.add_image(name, torch.from_numpy(imread(os.fspath(path))[..., :3].copy()), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(os.fspath(path))}, step=step)

    def close(self) -> None:
        """Finish TensorBoard's and W&B's files; ours are whole after every entry. A log is also a context manager."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._lock.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _write(self, entry: dict[str, Any]) -> None:
        append(self.folder / "log.jsonl", json.dumps(entry) + "\n")
        row = _scalars(entry)
        if row.keys() <= {"step"}:
            return
        self._rows.append(row)
        new = [key for key in row if key not in self._columns]
        self._columns += new
        if new:  # a new column changes every line, so the file is rewritten; this happens a few times in a run at most
            write_csv(self.folder / "log.csv", self._rows)
        else:
            line = io.StringIO()
            csv.DictWriter(line, self._columns, lineterminator="\n").writerow(row)
            append(self.folder / "log.csv", line.getvalue())


def read_log(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the entries of a run's ``log.jsonl`` without an incomplete last line of a killed run; none if there is no log."""
    path = Path(folder) / "log.jsonl"
    if not path.exists():
        return []
    entries: list[dict[str, Any]] = []
    for line in require_regular(path, "run log", "").read_text(encoding="utf-8").splitlines():
        try:
            entries.append(parse_json(line))
        except ValueError:
            break  # cut off when the run was killed
    return entries


def _scalars(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if not isinstance(value, (dict, list))}


def _is_number(value: Any) -> bool:
    if torch.is_tensor(value):
        return value.numel() == 1
    return isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "size", 0) == 1)


def _tensorboard(folder: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingPackageError.of("tensorboard=true", "tensorboard", "tensorboard", error) from error
    return SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)


def _wandb(folder: Path, asked: str | Mapping[str, Any], config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingPackageError.of("wandb", "wandb", "wandb", error) from error
    arguments = {"project": asked} if isinstance(asked, str) else dict(asked)
    defaults = {"mode": "offline", "dir": str(folder), "config": dict(config or {}), "settings": wandb.Settings(silent=True)}
    return wandb.init(**{**defaults, **arguments})
