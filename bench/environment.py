"""The columns that say where a row came from."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from typing import Any

import torch

from ttcfast.runtime import provenance


@cache
def columns(device: str) -> dict[str, Any]:
    """Machine, versions, commit and date (UTC), by the names of ``bench.rows.Row``; what cannot be told is empty.

    Read once per process: the commit that the code was loaded from, not one made while it runs. Sources that travelled without their .git
    have the commit that ``BENCH_COMMIT`` names, and nobody knows whether they differ from it.
    """
    record = provenance.record({})
    versions, git, host = record["versions"], record["git"] or {}, record["host"]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "device": device,
        "device_name": gpu if device == "cuda" else host["cpu"],
        "cpu": host["cpu"],
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


def driver() -> str:
    """The NVIDIA driver's version, as ``nvidia-smi`` tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip().splitlines()[0] if run.stdout.strip() else ""


def slug(device: str) -> str:
    """The device in the name of a results file: ``cpu``, or the GPU's model."""
    if device == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", columns(device)["gpu"].lower()).strip("-") or device
