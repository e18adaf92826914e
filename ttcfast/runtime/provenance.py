"""Records the provenance of a result: configuration, random seeds, versions, commit, machine."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .files import strict, write_json

_PACKAGES = ("ttcfast", "torch", "numpy", "triton", "h5py", "safetensors", "hydra-core", "matplotlib", "mujoco", "dm_control")
_SETTINGS = ("TTCFAST_BACKEND", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
_SOURCE = Path(__file__).resolve().parents[2]


def record(config: Any) -> dict[str, Any]:
    """Return everything needed to reproduce a result as plain JSON values.

    Args:
        config: The run's whole configuration, a mapping or a dataclass.

    Returns:
        ``config``, ``seeds`` (every key of the configuration called ``seed`` or ending in ``_seed``, by dotted path), ``argv``, ``time``
        (UTC), ``versions``, ``git`` (commit and whether files differed from it; None outside a checkout of this project), ``host``.
    """
    plain = _plain(config)
    return {
        "config": plain,
        "seeds": dict(_seeds(plain)),
        "argv": list(sys.argv),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(),
        "git": git_commit(),
        "host": _host(),
    }


def write(folder: str | os.PathLike[str], config: Any, name: str = "provenance.json") -> dict[str, Any]:
    """Record into ``folder/name`` and return the record."""
    entry = record(config)
    write_json(Path(folder) / name, entry)
    return entry


def git_commit() -> dict[str, Any] | None:
    """Return the commit of this code and whether its files differ from it; None if the package is installed or git is missing."""
    top = _git("rev-parse", "--show-toplevel")
    # An installed package may lie within another project's checkout (in its .venv), whose commit is not ours.
    if top is None or Path(top).resolve() != _SOURCE:
        return None
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", "-C", str(_SOURCE), *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _plain(config: Any) -> Any:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): _plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [_plain(value) for value in config]
    value = strict(config)
    return value if isinstance(value, (str, int, float, bool, list, type(None))) else str(value)


def _seeds(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        if key == "seed" or key.endswith("_seed"):
            yield path + key, value
        yield from _seeds(value, f"{path}{key}.")


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _host() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
