"""The columns that record the provenance of a row."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ttcfast.runtime import provenance

VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}  # the widest first


@cache
def columns(device: str) -> dict[str, Any]:
    """Return machine, versions, commit and date (UTC), by the names of ``bench.rows.Row``; unknown values are empty.

    Read once per process, so that the commit is the one the code was loaded from. Sources without a .git folder take the commit from
    ``BENCH_COMMIT``; whether they differ from it is unknown.
    """
    record = provenance.record({})
    versions, git, host = record["versions"], record["git"] or {}, record["host"]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "device": device,
        "device_name": gpu if device == "cuda" else processor(host["cpu"]),
        "cpu": processor(host["cpu"]),
        "gpu": gpu,
        "driver": driver() if gpu else "",
        "python": versions["python"],
        "torch": torch.__version__,
        "triton": versions["triton"] or "",
        "ttcfast": versions["ttcfast"] or "",
        "commit": git.get("commit") or os.environ.get("BENCH_COMMIT", ""),
        "dirty": git.get("dirty"),
        "date": record["time"],
    }


def processor(model: str, cpuinfo: str | None = None) -> str:
    """Return the CPU's model with its family and widest vectors: virtual machines call several generations by one model name."""
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        except OSError:
            return model
    family = re.search(r"^cpu family\s*: (\d+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", cpuinfo, re.MULTILINE)
    if family is None or flags is None:
        return model
    widest = next((name for flag, name in VECTORS.items() if flag in flags[1].split()), "SSE2")
    return f"{model} (family {family[1]} with {widest})"


def driver() -> str:
    """Return the NVIDIA driver's version as ``nvidia-smi`` reports it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip().splitlines()[0] if run.stdout.strip() else ""


def slug(device: str) -> str:
    """Return the device's name in a results file: ``cpu``, or the GPU's model."""
    if device == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", columns(device)["gpu"].lower()).strip("-") or device
