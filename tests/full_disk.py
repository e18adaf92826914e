"""Writers on a disk that ends: ``python -m tests.full_disk FOLDER JOBS`` runs each job once per limit, each in a child of its own.

A child may write no file longer than its limit (the disk's end as every user may set it), or take no more memory than that where the
job's name starts with ``memory:``; it leaves by the C library's ``exit``, where HDF5 tries once more to write what it holds. JOBS is a JSON
mapping of jobs to lists of limits. Prints, as JSON by job, a list with the children's status (below 0: the signal that killed it), what
they said on stderr, and the files that they left.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = os.sysconf("SC_PAGE_SIZE")


def outcomes(folder: Path, limits: dict[str, list[int]]) -> dict[str, list[dict[str, Any]]]:
    """What became of each job at each of its limits in bytes."""
    command = [sys.executable, "-m", "tests.full_disk", str(folder), json.dumps(limits)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def _generate(folder: Path) -> int:
    from ttcfast.cli.main import main

    words = "generate grid=16 factor=1 frames=5 t_end=0.02 presets=[riemann4] n=4 split=train per_file=4 batch=4"
    return main([*words.split(), f"out={folder}"])


def _large(folder: Path) -> int:
    """38 MB, twice when its pieces are put together."""
    from ttcfast.cli.main import main

    words = "generate grid=60 factor=1 frames=41 t_end=0.001 presets=[riemann4] n=16 split=train per_file=16 batch=4"
    return main([*words.split(), f"out={folder}"])


def _triplets(folder: Path) -> int:
    from tests.surrogates import drop_surrogate, euler_state, shifted
    from ttcfast.rewards.prm.triplets.build import build_triplets

    build_triplets(drop_surrogate(), shifted(euler_state(4, 16), 1), folder, K=4, T_prm=1, units="physical")
    return 0


def _shard(folder: Path) -> int:
    import torch

    from ttcfast.data.replay_shard import Episode, write_shard

    write_shard(folder / "a.pt", [Episode(torch.zeros(201, 8), torch.zeros(200, 2), torch.zeros(200))] * 8, {})
    return 0


def _figure(folder: Path) -> int:
    from matplotlib.figure import Figure

    from ttcfast.report.figures.style import save

    save(Figure(), folder / "a.png")
    return 0


JOBS: dict[str, Callable[[Path], int]] = {"generate": _generate, "large": _large, "triplets": _triplets, "shard": _shard, "figure": _figure}


def _child(job: str, folder: Path, limit: int) -> int:
    from ttcfast.runtime.errors import UserError

    kind, _, name = job.rpartition(":")
    if kind == "memory":
        held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (held + limit, held + limit))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        return JOBS[name](folder)
    except UserError as error:
        print(f"ttcfast: {error}", file=sys.stderr)
        return error.status


def _outcome(job: str, place: Path, limit: int) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 70
        try:
            status = _child(job, place, limit)
        finally:
            sys.stderr.flush()
            ctypes.CDLL(None).exit(status)
    os.close(writing)
    with open(reading, encoding="utf-8", errors="replace") as said:
        text = said.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
    return {"limit": limit, "status": status, "said": text, "left": left}


def _main(folder: Path, limits: dict[str, list[int]]) -> None:
    import torch

    torch.set_num_threads(1)
    found = {}
    for job in limits:
        name, at = job.rpartition(":")[2], folder / job.replace(":", "_")
        JOBS["generate" if name == "large" else name](at / "whole")  # imports everything, which the children then need no room for
        found[job] = [_outcome(job, at / str(limit), limit) for limit in limits[job]]
    print(json.dumps(found))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), json.loads(sys.argv[2]))
