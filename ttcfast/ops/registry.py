"""Registers the implementations of each operation and selects one that can run the arguments, or reports why none can."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ttcfast.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Reason = str | None  # None: available. A string: the reason why not.

NAMES = ("reference", "cpu", "triton", "cuda")
OPS: dict[str, tuple[Backend, ...]] = {}  # filled by `register` at import of each op; read by `ttcfast.info()`


@dataclass(frozen=True)
class Backend:
    """One implementation of one operation.

    Args:
        name: One of ``NAMES``.
        available: Tells whether it can run on this machine.
        supports: Tells whether it can run the given arguments.
        run: The implementation.
    """

    name: str
    available: Callable[[], Reason]
    supports: Callable[..., Reason]
    run: Callable[..., Any]


class BackendError(UserError, RuntimeError):
    """A backend requested by name cannot run. The message is one line and says why."""

    status = 2


def register(op: str, *backends: Backend) -> tuple[Backend, ...]:
    """Register an operation's backends in order of preference, and return them."""
    OPS[op] = backends
    return backends


def choose(op: str, backends: Sequence[Backend], asked: str, *args: Any) -> Backend:
    """Return the first backend that can run ``args``, or exactly the requested one.

    The order of ``backends`` is the order of preference. No backend is tried and abandoned on failure, so "auto" depends only on the
    machine and on the arguments' device, shape and dtype.

    Args:
        op: Name of the operation, for messages and for ``TTCFAST_BACKEND``.
        backends: Implementations of the operation.
        asked: ``"auto"`` or the name of a backend; a name overrides the environment.
        args: Arguments passed to ``supports``.

    Raises:
        BackendError: The requested backend is unknown, unavailable, or does not support the arguments.
    """
    source = ""
    if asked == "auto" and (given := os.environ.get("TTCFAST_BACKEND")):
        asked = _bound_by_environment(op, given, [b.name for b in backends])
        source = "" if asked == "auto" else " (asked for by TTCFAST_BACKEND)"
    reasons = []
    for backend in backends:
        if asked != "auto" and asked != backend.name:
            continue
        reason = backend.available() or backend.supports(*args)
        if reason is None:
            return backend
        reasons.append(reason if asked == backend.name else f"{backend.name}: {reason}")
    if not reasons:
        raise BackendError(f"{op} has no backend {asked!r}{source}; it has {', '.join(b.name for b in backends)} and 'auto'")
    raise BackendError(f"{op}: backend {asked!r}{source} cannot run: {'; '.join(reasons)}")


def yes(*_: Any) -> Reason:
    """Accept everything, for a backend that runs everywhere and takes every argument."""
    return None


def triton_available() -> Reason:
    """Tell whether Triton kernels can run here: on a CUDA device, or in Triton's interpreter."""
    try:
        import triton  # noqa: F401  (optional, and slow to import)
    except ImportError as error:
        return f"triton cannot be imported ({one_line(error)}); install it with: pip install 'ttcfast[gpu]'"
    if interpreting():
        return None
    import torch

    if torch.cuda.is_available():
        return None
    return (
        "there is no CUDA GPU and Triton's interpreter is off; use backend='auto', "
        "or set TRITON_INTERPRET=1 before Python starts to try the kernels on the CPU"
    )


def cpu_device(*tensors: Tensor | None) -> Reason:
    """Tell whether the C++ implementations can read these tensors, which must be in host memory."""
    for t in tensors:
        if t is not None and not t.is_cpu:
            return f"the tensors are on {t.device}; the C++ path reads host memory"
    return None


def contiguous(*tensors: Tensor | None) -> Reason:
    """Tell whether these tensors are contiguous, for implementations that require it."""
    for t in tensors:
        if t is not None and not t.is_contiguous():
            return f"a tensor has strides {t.stride()}; call .contiguous() on it"
    return None


def triton_device(device_type: str) -> Reason:
    """Tell whether Triton kernels can read tensors of this device: CUDA, or any that the interpreter can copy."""
    if device_type == "cuda" or interpreting():
        return None
    return f"the tensors are on {device_type}; Triton needs them on a CUDA device (or TRITON_INTERPRET=1 before Python starts)"


def interpreting() -> bool:
    """Tell whether Triton interprets kernels on the CPU; Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def one_line(error: BaseException) -> str:
    """Return an exception's message without line breaks, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def _bound_by_environment(op: str, given: str, names: Sequence[str]) -> str:
    """Return the backend that ``TTCFAST_BACKEND`` names: ``triton`` binds all that have it; ``arm:triton,topk:cuda`` single ones."""
    bound = "auto"
    for entry in given.split(","):
        target, _, name = entry.strip().rpartition(":")
        if name and name != "auto" and name not in NAMES:
            raise BackendError(f"TTCFAST_BACKEND names the backend {name!r}; known: auto, {', '.join(NAMES)}")
        if target == op:
            return name  # a single binding overrides the general one, in any order
        if not target and name in names:
            bound = name
    return bound
