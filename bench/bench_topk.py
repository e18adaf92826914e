"""``ops.topk`` against ``torch.topk`` and other partial sorts, on random scores and on orders that are hard for a selection.

The gate compares our indices with the reference, and the values of every peer with ours (peers may break ties differently). Each peer
returns the k best in order, values and indices:

* ``torch.topk``: as it is.
* ``numpy.argpartition``: ``argpartition``, then a sort of the k best. numpy's AVX-512 path is slow on Zen 4; for its best result there, run
  with ``NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL AVX512_SPR"``.
* ``torch.topk, torch.compile``: Inductor calls ``torch.topk``; what remains is the host's part (CUDA).
* ``FlashInfer``: ``flashinfer.top_k``, sorted, deterministic and with ties to the smaller index, if its wheel is installed (CUDA).
* ``FlashInfer, CUB``: the same function through ``cub::DeviceBatchedTopK``, with the same ties; it has no order, so a torch sort of k
  follows. Rows of at most 2^21, and GPUs from Hopper on (CUDA).
* ``CUB DeviceTopK``: unordered pairs, followed by a torch sort of k; if the wheel ``nvidia-cuda-cccl`` and nvcc are available (CUDA, one
  row). Not deterministic among ties, unlike ours.

On CUDA the goal is >= 1.0x of both, and >= 1.3x of FlashInfer at [256, 262144]; targets name only peers available on every machine.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttcfast.ops import topk

from . import cub_topk, timing
from .groups import backend_of, compiled
from .targets import Target
from .timing import Case

RUNS = (10, 100, 1000)  # lengths of sorted runs

# name: (rows, n, k, order of the scores)
LARGE = {
    f"n1e6 k{k} {order}": (1, 1_000_000, k, order) for k in (1, 16, 256, 1024) for order in ("random", "tied", "ascending", "descending")
}
CPU_CASES = {
    **LARGE,
    **{f"n1e6 k256 {order}": (1, 1_000_000, 256, order) for order in ("all tied", "all nan", "shared bits")},
    **{f"n1e6 k256 {order} {run}": (1, 1_000_000, 256, f"{order} {run}") for order in ("runs of", "nearly ascending") for run in RUNS},
    "n1e6 k4096 random": (1, 1_000_000, 4096, "random"),
    **{f"256x4096 k{k} random": (256, 4096, k, "random") for k in (64, 1024)},
    **{f"{rows}x50257 k50 random": (rows, 50_257, 50, "random") for rows in (1, 32)},  # a language model's vocabulary
}
CUDA_CASES = {
    **LARGE,
    **{f"n1e6 k1024 {order}": (1, 1_000_000, 1024, order) for order in ("all tied", "all nan", "shared bits")},
    "64x131072 k256 random": (64, 131_072, 256, "random"),
    "256x262144 k256 random": (256, 262_144, 256, "random"),
    "256x4096 k64 random": (256, 4096, 64, "random"),
    "4096x64 k8 random": (4096, 64, 8, "random"),
}


def in_runs(x: Tensor, run: int, *, descending: bool = False) -> Tensor:
    """Sort every ``run`` consecutive scores, and what is left after the last whole run."""
    return torch.cat([part.sort(dim=1, descending=descending).values for part in x.split(run, dim=1)], 1)


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "tied": lambda x: (8 * x).round(),  # about 80 distinct values
    "ascending": lambda x: x.sort(dim=1).values,
    "descending": lambda x: x.sort(dim=1, descending=True).values,
    **{f"runs of {run}": partial(in_runs, run=run) for run in RUNS},  # each run ascends
    **{f"nearly ascending {run}": lambda x, run=run: in_runs(x.sort(dim=1).values, run, descending=True) for run in RUNS},
    "all tied": torch.ones_like,
    "all nan": lambda x: torch.full_like(x, float("nan")),
    "shared bits": lambda x: 1 + torch.finfo(x.dtype).eps * (2 * x).round().clamp(0, 7),
}

_FEW = [f"n1e6 k{k} {order}" for k in (1, 16, 256) for order in ("random", "tied")]
TARGETS = (
    *(Target(name, "torch.topk", "ratio", least=8) for name in _FEW),
    *(Target(f"n1e6 k1024 {order}", "torch.topk", "ratio", least=5) for order in ("random", "tied")),
    Target("n1e6 * ascending", "torch.topk", "ratio", least=2),
    *(Target(f"n1e6 k256 {order} *", "torch.topk", "ratio", least=8) for order in ("runs of", "nearly ascending")),
    Target("n1e6 k4096 random", "torch.topk", "ratio", least=5),
    Target("256x4096 *", "torch.topk", "ratio", least=3),
    Target("*x50257 *", "torch.topk", "ratio", least=3),
    *(Target(name, "numpy.argpartition", "ratio", least=10) for name in _FEW),
    Target("n1e6 * random", "", "graph_hot_us", most=20, device="cuda"),
    Target("n1e6 * random", "torch.topk", "graph_ratio", least=5, device="cuda"),
    Target("64x131072 *", "", "graph_hot_us", most=45, device="cuda"),
    Target("64x131072 *", "torch.topk", "graph_ratio", least=4, device="cuda"),
    Target("256x262144 *", "", "graph_p50_us", most=125, device="cuda"),
    Target("256x262144 *", "torch.topk", "graph_ratio", least=6, device="cuda"),
)


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    for name, (rows, n, k, order) in (CPU_CASES if device == "cpu" else CUDA_CASES).items():
        if tiny:
            rows, n, k = min(rows, 3), min(n, 700), min(k, 40)
        problem = Problem(rows, n, k, order, device)
        yield problem.case("topk", name, f"[{rows}, {n}], k {k}", "float32", problem.peers(tiny), bytes_moved=4 * rows * n)


Peer = Callable[["Problem"], tuple[Any, Any]]  # -> values and indices, best first


class Problem(timing.Problem):
    """Scores in one of the orders; created on first use."""

    def __init__(self, rows: int, n: int, k: int, order: str, device: str) -> None:
        self.rows, self.n, self.k, self.order, self.device = rows, n, k, order, device

    @cached_property
    def scores(self) -> Tensor:
        generator = self.generator(3)
        return ORDERS[self.order](torch.randn(self.rows, self.n, device=self.device, generator=generator))

    @cached_property
    def array(self) -> np.ndarray[Any, Any]:
        return self.scores.numpy()

    def peers(self, tiny: bool = False) -> dict[str, Peer]:
        """Ours first."""
        backend = backend_of("topk", self.device)
        found: dict[str, Peer] = {
            f"ttcfast, {backend}": lambda p: topk(p.scores, p.k, backend=backend),
            "torch.topk": lambda p: tuple(torch.topk(p.scores, p.k)),  # type: ignore[arg-type, return-value]
        }
        if self.device == "cpu":
            return {**found, "numpy.argpartition": lambda p: by_argpartition(p.array, p.k)}
        fused = compiled(torch.topk, tiny=tiny)
        found["torch.topk, torch.compile"] = lambda p: tuple(fused(p.scores, p.k))  # type: ignore[arg-type, return-value]
        if flashinfer() is not None:
            found["FlashInfer"] = by_flashinfer
            if self.n <= MOST_OF_CUB and torch.cuda.get_device_capability()[0] >= 9:
                found["FlashInfer, CUB"] = by_flashinfer_cub
        if self.rows == 1 and cub_topk.headers() is not None:
            found["CUB DeviceTopK"] = lambda p: cub_topk.select(p.scores, p.k)
        return found

    def check(self, peers: dict[str, Peer]) -> None:
        values, indices = topk(self.scores, self.k, backend="reference")
        for name, function in peers.items():
            found, where = (torch.as_tensor(x) for x in function(self))
            if self.order == "all nan" and not name.startswith("ttcfast"):
                continue  # the peers differ in their treatment of NaN
            torch.testing.assert_close(found, values, rtol=0, atol=0, equal_nan=True, msg=partial("{}: {}".format, name))
            if name.startswith("ttcfast") and not torch.equal(where, indices):
                raise AssertionError(f"{name}: the indices differ from the reference")


def by_argpartition(scores: np.ndarray[Any, Any], k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the k largest of each row with numpy, best first."""
    kept = np.argpartition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k :]
    values = np.take_along_axis(scores, kept, 1)
    order = np.argsort(-values, axis=1)
    return np.take_along_axis(values, order, 1), np.take_along_axis(kept, order, 1)


MOST_OF_CUB = 2**21  # scores per row
SMALLER_INDEX = 1  # flashinfer.TopKTieBreak.SMALL


@cache
def flashinfer() -> Any:
    """Return the package FlashInfer if it is installed and can break ties, otherwise None."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    found = importlib.import_module("flashinfer")
    return found if hasattr(found, "TopKTieBreak") else None


def by_flashinfer(problem: Problem) -> tuple[Tensor, Tensor]:
    return flashinfer().top_k(problem.scores, problem.k, sorted=True, deterministic=True, tie_break=SMALLER_INDEX)  # type: ignore[no-any-return]


def by_flashinfer_cub(problem: Problem) -> tuple[Tensor, Tensor]:
    os.environ["FLASHINFER_TOPK_ALGO"] = "cub"  # read at every call
    try:
        values, indices = flashinfer().top_k(problem.scores, problem.k, tie_break=SMALLER_INDEX)
    finally:
        del os.environ["FLASHINFER_TOPK_ALGO"]
    ordered = values.sort(dim=1, descending=True)
    return ordered.values, indices.gather(1, ordered.indices)
