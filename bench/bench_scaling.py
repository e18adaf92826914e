"""How time grows: with the number of candidates B, the grid, the k of top-k, the K steps of a flow, and processes.

Small problems, so that a million candidates fit in memory: 4x4 cells along B, eight candidates along the grid. ``step`` is a search step
by input noise around one 3x3 convolution in chunks of 1024 (``bench.bench_search``), along processes one of the shipped surrogate, whose
processes share the candidates. The peers are eager torch; compiling for each of these shapes would take minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttcfast.models import load_surrogate
from ttcfast.rewards.arm import ARMScorer
from ttcfast.spec import TTCConfig
from ttcfast.ttc.beam import TTCBeam

from . import bench_arm, bench_mlp_flow, bench_noise, bench_topk, environment
from .bench_search import CHUNK, Search
from .groups import backend_of
from .rows import OK, PEER_FAILED, Row
from .timing import Case, percentile

ROOT = Path(__file__).resolve().parent.parent
B = (1, 10, 100, 1000, 10_000, 100_000, 1_000_000)
GRID = (32, 64, 128, 256, 512)
SMALL_K = (1, 4, 16, 64, 256, 1024, 4096)  # of top-k among a million
STEPS = (1, 2, 4, 8, 16)  # of Heun's method
PROCESSES = (1, 2)
CELLS, FEW, SHARED = 4, 8, 64  # cells of a side along B; candidates along the grid; candidates that processes share


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    for axis, values in (("B", B), ("grid", GRID)):
        for at in values:
            b, side = (at, CELLS) if axis == "B" else (FEW, at)
            if tiny:
                b, side = min(b, 5), min(side, 6)
            shape = f"[1, {b}, 4, {side}, {side}]"
            yield _arm(f"arm, {axis} {at}", b, side, shape, device)
            if axis == "grid":
                yield _noise(f"add_noise, {axis} {at}", b, side, shape, device)
            yield _step(f"step, {axis} {at}", b, side, shape, device)
            if axis == "B":
                n, k = b, min(b, 8)
                yield _topk(f"topk, {axis} {at}", n, k, device)
    for k in SMALL_K:
        yield _topk(f"topk, k {k}", 700 if tiny else 1_000_000, min(k, 40) if tiny else k, device)
    for steps in STEPS:
        yield _flow(f"mlp_flow, K {steps}", min(steps, 2) if tiny else steps, tiny, device)


def further(device: str, pattern: str) -> Iterator[Row]:
    """Yield the rows along processes, each of one thread and of a run of its own."""
    first = None
    for count in PROCESSES:
        name = f"step, processes {count}"
        if device != "cpu" or not fnmatchcase(name, pattern):
            continue
        base: dict[str, Any] = {"group": "scaling", "case": name, "shape": f"[1, {SHARED}, 4, 64, 64]", "dtype": "float32"}
        base |= {"peer": "shard='candidates'", "ours": "shard='candidates'", "threads": 1, **environment.columns(device)}
        command = [sys.executable, "-m", "bench.bench_scaling", str(count)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        if run.returncode:
            yield Row(**base, status=PEER_FAILED, error=run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "killed")
            continue
        spent = [1e6 * float(word) for word in run.stdout.split()]
        low, middle, high = (percentile(spent, percent) for percent in (20, 50, 80))
        first = first or middle
        note = f"{first / middle:.2f} times as fast as {PROCESSES[0]} process"
        yield Row(**base, status=OK, error="", rounds=len(spent), loops=1, p20_us=low, p50_us=middle, p80_us=high, ratio=1.0, note=note)


def _arm(name: str, b: int, side: int, shape: str, device: str) -> Case:
    problem = Arm(1, b, side, False, device)
    peers = problem.peers(tiny=True)  # nothing compiled
    kept = {peer: peers[peer] for peer in (next(iter(peers)), "tuned, eager")}
    return problem.case("scaling", name, shape, "float32", kept, bytes_moved=16 * b * side * side)


def _noise(name: str, b: int, side: int, shape: str, device: str) -> Case:
    problem = bench_noise.Problem(1, b, side, torch.float32, device)
    peers = problem.sums(tiny=True)
    kept = {peer: peers[peer] for peer in (next(iter(peers)), "randn_like, eager")}
    return problem.case("scaling", name, shape, "float32", kept, bytes_moved=16 * b * side * side)


def _topk(name: str, n: int, k: int, device: str) -> Case:
    problem = bench_topk.Problem(1, n, k, "random", device)
    peers = problem.peers()
    kept = {peer: peers[peer] for peer in (next(iter(peers)), "torch.topk")}
    return problem.case("scaling", name, f"[1, {n}], k {k}", "float32", kept, bytes_moved=4 * n)


def _flow(name: str, steps: int, tiny: bool, device: str) -> Case:
    latent, conditions, widths, b, _ = (16, 3, (8, 8), 4, 0) if tiny else bench_mlp_flow.CPU_CASES["small"]
    problem = bench_mlp_flow.Problem(latent, conditions, widths, b, steps, "forward", device)
    peers = {f"ttcfast, {backend_of('mlp_flow', device)}": _ours, "eager": _eager}
    shape = f"[{b}, {latent}] + {conditions} -> {'x'.join(map(str, widths))}, K = {steps}"
    return problem.case("scaling", name, shape, "float32", peers)


def _ours(problem: bench_mlp_flow.Problem) -> Any:
    return problem.run(bench_mlp_flow.our_step, False)


def _eager(problem: bench_mlp_flow.Problem) -> Any:
    return problem.run(bench_mlp_flow.eager, False)


def _step(name: str, b: int, side: int, shape: str, device: str) -> Case:
    search = OnGrid(b, side, device)
    peer = "chunks of 1024"
    return Case("scaling", name, shape, "float32", {peer: search.step}, peer, search.check_step, device=device)


class Arm(bench_arm.Problem):
    """One candidate, too, so none is spoilt for the gate; ``bench.bench_arm`` does that."""

    def check(self, peers: Any) -> None:
        expected = self.expected()
        for name, run in peers.items():
            torch.testing.assert_close(run(self).double(), expected, rtol=1e-4, atol=1e-4, msg=partial("{}: {}".format, name))


class OnGrid(Search):
    """A step by input noise on ``side`` times ``side`` cells."""

    def __init__(self, b: int, side: int, device: str) -> None:
        super().__init__(b, "noise", CHUNK, device)
        self.side = side

    @cached_property
    def x(self) -> Tensor:
        lowest = torch.tensor([1.0, 0.0, 0.0, 2.5]).reshape(4, 1, 1)
        drawn = torch.rand(1, 4, self.side, self.side, generator=torch.Generator().manual_seed(1))
        return (lowest + 0.1 * drawn).to(self.device)


def _shared_step(rank: int, count: int, folder: str) -> None:
    """Print the seconds of five steps of the shipped surrogate, each shared by ``count`` processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    fm = load_surrogate(ROOT / "examples" / "surrogate.safetensors")
    cfg = TTCConfig(branching_factor=SHARED, beam_width=1, approach="beam", chunk_size=8, shard="candidates")
    controller, x = TTCBeam(fm, ARMScorer(spec=fm.spec), cfg), OnGrid(SHARED, 64, "cpu").x
    for step in range(6):
        torch.distributed.barrier()
        start = time.perf_counter()
        controller.step_from(x, step=1)
        torch.distributed.barrier()
        if step and rank == 0:  # the first loads and measures
            print(time.perf_counter() - start)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        torch.multiprocessing.spawn(_shared_step, (int(sys.argv[1]), place), nprocs=int(sys.argv[1]))
