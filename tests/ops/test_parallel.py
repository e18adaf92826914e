"""The kept threads of csrc/parallel.h: what calls, exceptions, forks and idleness do to them, alone and below the operations."""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ttcfast.ops import native, topk

ROOT = Path(__file__).resolve().parents[2]
PROMISES = ("all_add_up", "together", "kept", "nested", "several_callers", "exceptions", "idle", "forked")
RACES = tuple(p for p in PROMISES if p not in ("idle", "forked"))  # gcc's detector runs no threads in a forked child


def built(folder: Path, *flags: str) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    program = folder / "pool"
    sources = ["tests/ops/parallel_pool.cpp", "csrc/parallel.cpp"]
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-g1", "-pthread", "-Wall", *flags, *sources, "-ldl", "-o", program], cwd=ROOT, check=True
    )
    return program


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    return built(tmp_path_factory.mktemp("pool"))


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(pool, promise):
    ran = subprocess.run([pool, promise], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_no_data_race_is_seen_when_sanitized(tmp_path):
    around = ["setarch", "-R"] if shutil.which("setarch") else []  # gcc's runtime does not know the address layouts of newer kernels
    program = built(tmp_path, "-fsanitize=thread")
    for promise in RACES:
        ran = subprocess.run([*around, program, promise], capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, f"{promise}: {ran.stdout}{ran.stderr}"


@pytest.fixture
def two_torch_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def best(seed: int) -> bytes:
    """Enough scores for two threads, and nothing else so large: OpenMP's threads do not survive a fork, and torch would wait for them."""
    scores = torch.from_numpy(np.random.default_rng(seed).random((8, 1 << 15)))
    return topk(scores, 5, backend="cpu")[1].numpy().tobytes()


def child(seed: int, queue) -> None:
    torch.set_num_threads(2)
    queue.put(best(seed))


needs_extension = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="fork is safe to use on Linux alone")
def test_a_forked_child_computes_as_its_parent(two_torch_threads):
    expected = best(3)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(3, queue))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join(60)
    assert process.exitcode == 0


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="fork is safe to use on Linux alone")
def test_a_child_forked_before_the_first_call_does_without_torchs_threads():
    code = (
        "import os, signal, torch\nfrom ttcfast.ops import topk\ntorch.set_num_threads(2)\nscores = torch.rand(1 << 22).exp()  # by both\n"
        "if os.fork() == 0:\n    signal.alarm(30)\n    topk(scores[: 1 << 18].view(8, -1), 5, backend='cpu')\n    os._exit(0)\n"
        "raise SystemExit(os.wait()[1])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (ran.returncode, ran.stderr) == (0, "")


class Best(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> bytes:
        torch.set_num_threads(2)
        return best(index)


@needs_extension
def test_workers_of_a_data_loader_compute_as_their_parent(two_torch_threads):
    found = list(torch.utils.data.DataLoader(Best(), batch_size=None, num_workers=2))
    assert found == [best(i) for i in range(4)]


@needs_extension
def test_several_python_threads_at_once_get_what_each_gets_alone(two_torch_threads):
    expected, wrong = [best(i) for i in range(4)], []

    def run(i: int) -> None:
        torch.set_num_threads(2)
        wrong.extend(i for _ in range(20) if best(i) != expected[i])

    callers = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def in_a_new_process(*after: str) -> None:
    call = ("import os, torch", "from ttcfast.ops import topk", "torch.set_num_threads(2)", "torch.zeros(1 << 20).sum()")
    code = "\n".join(
        [*call, "ids = os.listdir('/proc/self/task')" if after else "", "topk(torch.zeros(8, 1 << 15), 5, backend='cpu')", *after]
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (ran.returncode, ran.stderr) == (0, "")


@needs_extension
def test_the_interpreter_exits_right_after_a_call():
    in_a_new_process()


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_operations_run_on_the_threads_that_torch_has():
    in_a_new_process("assert set(os.listdir('/proc/self/task')) <= set(ids)")
