"""The cases of every group under pytest-benchmark, for its reports and comparisons: ``pytest bench --benchmark-only``.

Quote ratios from ``python -m bench`` only: it interleaves the peers, which pytest-benchmark cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

from bench import groups
from bench.timing import Case, forget_compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def peers() -> Iterator[Any]:
    for group in groups.names():
        for index, case in enumerate(groups.cases(group, DEVICE)):
            yield from (pytest.param(group, index, peer, id=f"{group}/{case.name}/{peer}") for peer in case.peers)


@lru_cache(maxsize=1)  # keeps the tensors of one case at a time
def checked(group: str, index: int) -> tuple[Case, str]:
    """Return the case and its gate's error."""
    forget_compiled()
    case = list(groups.cases(group, DEVICE))[index]
    try:
        case.check()
    except Exception as error:
        return case, f"{type(error).__name__}: {error}"
    return case, ""


@pytest.mark.parametrize(("group", "index", "peer"), list(peers()))
def test_throughput(benchmark: Any, group: str, index: int, peer: str) -> None:
    case, wrong = checked(group, index)
    if wrong:
        pytest.fail(f"the peers disagree, so nothing is timed: {wrong}")

    def timed() -> None:
        case.peers[peer]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info |= {"case": case.name, "shape": case.shape, "dtype": case.dtype, "peer": peer, "device": DEVICE}
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(timed, rounds=9, warmup_rounds=2)
    if case.bytes_moved:
        benchmark.extra_info["GB/s"] = case.bytes_moved / benchmark.stats.stats.median / 1e9
