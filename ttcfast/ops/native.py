"""The one file that imports the compiled extension ``ttcfast._C``: on first use, keeping the reason when it is absent."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from .registry import Reason, one_line

ABI = 3  # raised together with TTCFAST_ABI in csrc/bind.cpp whenever a signature between the two changes

highest_level: int | None = None  # None: the best that the processor has


@cache
def _load() -> tuple[ModuleType | None, Reason]:
    try:
        from ttcfast import _C
    except ImportError as error:
        return None, (
            f"the compiled extension ttcfast._C cannot be imported ({one_line(error)}); "
            "build it with a C++17 compiler at hand: pip install -v . (or -e .)"
        )
    if getattr(_C, "abi", None) != ABI:
        return None, f"ttcfast._C was built for another version of the sources (abi {getattr(_C, 'abi', None)}, not {ABI}); reinstall"
    return _C, None


def available() -> Reason:
    """None when the extension can be used, else why not."""
    return _load()[1]


def module() -> ModuleType:
    """The extension itself.

    Raises:
        ImportError: it is not there, with the reason.
    """
    loaded, reason = _load()
    if loaded is None:
        raise ImportError(reason)
    return loaded


def cpu_level() -> int:
    """The instruction set that hot loops use, an index of ``module().cpu_levels``; a test may set ``highest_level``."""
    return len(module().cpu_levels) - 1 if highest_level is None else highest_level


def device_info() -> dict[str, object]:
    """What the extension says about CUDA: was it built with it, for which runtime, and which devices it sees."""
    return dict(module().device_info())
