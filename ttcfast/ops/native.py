"""Access to the compiled extension ``ttcfast._C``, imported only here and on first use; if it is absent, the reason is kept."""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .registry import Reason, one_line

ABI = 7  # increment together with TTCFAST_ABI in csrc/bind.cpp whenever a signature between the two changes

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # positions are the codes of DType in csrc/dtype.h

highest_level: int | None = None  # None: the best that the processor supports


_forked: list[bool] = []  # whether this process is a child, for the extension, which sees no fork before it is loaded
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


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
    if _forked:
        _C.forked()
    return _C, None


def available() -> Reason:
    """Return None if the extension can be used, otherwise the reason."""
    return _load()[1]


def module() -> ModuleType:
    """Return the extension.

    Raises:
        ImportError: It cannot be used; the message gives the reason.
    """
    loaded, reason = _load()
    if loaded is None:
        raise ImportError(reason)
    return loaded


def code(dtype: torch.dtype) -> int:
    """Return the extension's code of a dtype."""
    return DTYPES.index(dtype)


def addresses(*tensors: Tensor | None) -> list[int]:
    """Return the address of each tensor, 0 for None."""
    return [0 if t is None else t.data_ptr() for t in tensors]


def threads_and_level() -> tuple[int, int]:
    """Return the last arguments of every extension function: the number of threads and the highest instruction set.

    The latter is an index of ``module().cpu_levels``; a test may set ``highest_level``.
    """
    return torch.get_num_threads(), len(module().cpu_levels) - 1 if highest_level is None else highest_level


def device_info() -> dict[str, object]:
    """Return the extension's CUDA information: whether it was built with it, for which runtime, and the visible devices."""
    return dict(module().device_info())
