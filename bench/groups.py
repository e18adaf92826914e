"""The groups of cases: every ``bench/bench_<group>.py``.

Such a file has ``cases(device, *, tiny=False)``, which yields ``bench.timing.Case``, and may have ``TARGETS``, a sequence of
``bench.targets.Target``, and ``further(device, pattern)``, which yields rows without timings. With ``tiny=True`` it yields the same
cases at sizes of a few cells without compiling (see ``compiled`` below), so that a test can run every gate.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from ttcfast.ops import registry

from .rows import Row
from .targets import Target
from .timing import Case

FOLDER = Path(__file__).resolve().parent
RUNS_ON = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
F = TypeVar("F", bound=Callable[..., Any])

autotuned = True  # --untuned clears it


def names() -> list[str]:
    """Return the names of all groups, sorted."""
    return sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


def cases(group: str, device: str, *, tiny: bool = False) -> Iterator[Case]:
    """Yield the cases of ``group`` on ``device`` one by one, so that the tensors of one are freed before the next allocates its own."""
    return _module(group).cases(device, tiny=tiny)


def targets(group: str) -> Sequence[Target]:
    """Return the targets of ``group``."""
    return tuple(getattr(_module(group), "TARGETS", ()))


def further(group: str, device: str, pattern: str) -> Iterator[Row]:
    """Yield the rows of ``group`` without timings, for cases that match ``pattern``; most groups have none."""
    make = getattr(_module(group), "further", None)
    return iter(()) if make is None else make(device, pattern)


def compiled(function: F, *, tiny: bool = False, **options: Any) -> F:
    """Return ``torch.compile(function, dynamic=False, fullgraph=True, **options)``, created on its first call; ``function`` if ``tiny``.

    ``fullgraph`` makes Dynamo raise where it would otherwise silently fall back to eager mode.
    """
    if tiny:
        return function
    options = {"dynamic": False, "fullgraph": True, **options}

    @cache
    def made() -> Any:
        return torch.compile(function, **options)

    return lambda *args, **kwargs: made()(*args, **kwargs)  # type: ignore[return-value]


def tuned(device: str) -> dict[str, Any]:
    """Return the options of :func:`compiled` for a peer that is to be autotuned on a GPU, at minutes a case."""
    return {"mode": "max-autotune-no-cudagraphs"} if device == "cuda" and autotuned else {}


def backend_of(op: str, device: str) -> str:
    """Return the backend of ``op`` that "auto" selects on ``device``. Triton's interpreter does not count."""
    return next(b.name for b in registry.OPS[op] if b.name in RUNS_ON[device] and b.available() is None)


def _module(group: str) -> ModuleType:
    return importlib.import_module(f"bench.bench_{group}")
