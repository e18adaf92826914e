"""The CUDA kernels of topk, run thread by thread on the CPU: their logic holds on every input, for any order of blocks."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.ops.test_topk import DTYPES, assert_same
from ttcfast.ops import topk

ROOT = Path(__file__).resolve().parents[2]
MULTIPROCESSORS = 2  # so few that the blocks of a row are few too


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    library = tmp_path_factory.mktemp("emulated") / "topk.so"
    source = ROOT / "tests/ops/topk_emulated.cpp"
    subprocess.run([compiler, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}", source, "-o", library], check=True)
    yield ctypes.CDLL(str(library))


def run(emulator: ctypes.CDLL, scores: Tensor, k: int, ids: Tensor | None = None, seed: int = 0) -> tuple[tuple[Tensor, Tensor], int]:
    """The result and the blocks per row."""
    values, indices = scores.new_empty(scores.shape[0], k), torch.empty(scores.shape[0], k, dtype=torch.int64)
    sizes = (ctypes.c_int64 * 3)(*scores.shape, k)
    strides = (ctypes.c_int64 * 4)(*scores.stride(), *((0, 0) if ids is None else ids.stride()))
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (scores, ids, values, indices)]
    emulator.topk_emulated.restype = ctypes.c_int64
    parts = emulator.topk_emulated(
        DTYPES.index(scores.dtype), sizes, pointers[0], strides, *pointers[1:], ctypes.c_int64(MULTIPROCESSORS), ctypes.c_uint(seed)
    )
    assert parts != -1, "the workspace was overrun"
    assert parts > 0, "what must be zero for the next call is not"
    return (values, indices), parts


def check(emulator: ctypes.CDLL, scores: Tensor, k: int, ids: Tensor | None = None, seed: int = 0) -> int:
    found, parts = run(emulator, scores, k, ids, seed)
    assert_same(found, topk(scores, k, ids=ids, backend="reference"))
    return parts


@pytest.mark.parametrize("named", [False, True], ids=["positions", "ids"])
@pytest.mark.parametrize("values", cases.VALUES)
def test_a_warp_or_a_block_per_row(emulator, values, named):
    for dtype, n, k in ((torch.float32, 33, 5), (torch.float64, 64, 64), (torch.bfloat16, 257, 30), (torch.float16, 1100, 3)):
        scores = cases.VALUES[values]((2, n), dtype)
        ids = torch.randint(-9, 9, scores.shape) if named else None
        assert check(emulator, scores, k, ids) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ["normal", "ties", "constant", "nan"])
def test_a_block_narrows_down_a_row_that_does_not_fit(emulator, values, dtype):
    scores = cases.VALUES[values]((1, 3001), dtype)
    check(emulator, scores, 100)
    check(emulator, scores, 100, torch.randint(-(2**62), 2**62, scores.shape))


@pytest.mark.parametrize("values", ["normal", "ties", "constant", "ascending", "shared leading bits", "-inf"])
def test_several_blocks_per_row(emulator, values):
    scores = cases.VALUES[values]((1, 17_003), torch.float32)
    assert check(emulator, scores, 70, seed=1) == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ["normal", "ties"])
def test_rows_at_any_address_and_with_any_stride(emulator, values, dtype):
    """Read 16 bytes at a time where the row allows it: the first of two, none, and the second alone."""
    room = cases.VALUES[values]((1, 2 * 5_001 + 8), dtype)[0]
    for start in (0, 1):
        check(emulator, room[start : start + 2 * 5_001].view(2, 5_001), 60)
        check(emulator, room[start : start + 1_001][None], 60)
    check(emulator, room[: 2 * 5_001].view(5_001, 2).T, 60)


def test_ties_are_the_first_wherever_they_lie(emulator):
    """All in the first share, all in the last, one in each, and scores above them everywhere."""
    n = 13_000
    for places in (torch.arange(500), torch.arange(n - 500, n), torch.arange(0, n, 20)):
        scores = torch.zeros(1, n)
        scores[0, places] = 1
        scores[0, torch.arange(11, n, n // 10)] = 2
        for k in (11, 400):
            assert check(emulator, scores, k, seed=k) == 4


def test_several_blocks_per_row_with_ids_that_repeat(emulator):
    scores, ids = torch.zeros(2, 9_000), torch.randint(0, 100, (2, 9_000))
    assert check(emulator, scores, 300, ids, seed=2) == 2


def test_most_that_shared_memory_takes(emulator):
    check(emulator, torch.randint(0, 9, (1, 2500)).float(), 2048)
