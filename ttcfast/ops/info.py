"""Reports what this installation can run, what it cannot, and why."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from . import native, registry

ENVIRONMENT = ("TTCFAST_BACKEND", "TTCFAST_CUDA", "CMAKE_ARGS", "TRITON_INTERPRET")


class Info(dict[str, Any]):
    """Plain data that prints as a report."""

    def __str__(self) -> str:
        lines = [f"ttcfast {self['version']}, Python {self['python']}, torch {self['torch']}, {self['threads']} threads, {self['machine']}"]
        lines += [f"{title}: {_line(self[title])}" for title in ("extension", "triton", "devices")]
        alike: dict[tuple[str, ...], list[str]] = {}
        absent: dict[tuple[str, str], list[str]] = {}
        for op, backends in self["ops"].items():
            alike.setdefault(tuple(name for name, reason in backends.items() if reason is None), []).append(op)
            for name, reason in backends.items():
                if reason is not None:
                    absent.setdefault((name, reason), []).append(op)
        lines += [f"backends of {', '.join(ops)}: {', '.join(names)}" for names, ops in alike.items()]
        lines += [f"no {name} for {', '.join(ops)}: {reason}" for (name, reason), ops in absent.items()]
        variables = _line([f"{k}={v}" for k, v in self["environment"].items()])
        lines.append(f"environment: {variables or 'none of ' + ', '.join(ENVIRONMENT)}")
        return "\n".join(lines)

    __repr__ = __str__


def info() -> Info:
    """Report the backends of every operation, the build of the extension and the devices, with a reason for each absence.

    Returns:
        A dict that prints as a report. ``version``, ``python``, ``torch``, ``machine``: strings. ``threads``: number of torch threads,
        which the C++ operations use too. ``extension``, ``triton``: a description, or why it is absent. ``devices``: one line each.
        ``ops``: for each operation its backends in order of preference, None for one that can run here, otherwise the reason.
        ``environment``: our environment variables that are set.
    """
    return Info(
        version=_version("ttcfast") or "not installed (running from a source tree)",
        python=platform.python_version(),
        torch=f"{torch.__version__} (CUDA {torch.version.cuda})" if torch.version.cuda else f"{torch.__version__} (no CUDA)",
        machine=platform.machine(),
        threads=torch.get_num_threads(),
        extension=_extension(),
        triton=registry.triton_available() or f"{_version('triton')}{', interpreted' if registry.interpreting() else ''}",
        devices=_devices(),
        ops={op: {b.name: b.available() for b in backends} for op, backends in registry.OPS.items()},
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extension() -> str:
    reason = native.available()
    if reason is not None:
        return reason
    built = native.device_info()
    compiler = native.module().compiler
    if not built["built_with_cuda"]:
        return f"built by {compiler}, without CUDA"
    sees = "its devices are usable" if built["devices"] else f"it sees no device: {built['reason']}"
    return f"built by {compiler}, for CUDA {_cuda(built['runtime_version'])}; {sees}"


def _cuda(version: Any) -> str:
    """Format CUDA's version number, 1000 major + 10 minor, as major.minor."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["no CUDA device (torch was built without CUDA)" if torch.version.cuda is None else "no CUDA device (torch sees none)"]
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{d.name}, sm_{d.major}{d.minor}, {d.multi_processor_count} multiprocessors, {d.total_memory / 2**30:.0f} GiB" for d in found]


def _line(value: Any) -> str:
    return "; ".join(value) if isinstance(value, list) else str(value)
