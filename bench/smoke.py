"""What a GPU is asked first, in a minute: every operation once, searches with their waits, a recorded step: ``python -m bench.smoke``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ttcfast.ops.registry import one_line
from ttcfast.spec import TTCConfig
from ttcfast.ttc.beam import TTCBeam

from .__main__ import main as bench
from .bench_step import SEED, Setting

T = 4
MOST_WAITS = {"greedy": 1, "beams": 2}  # a step, from docs/design/decisions.md ("Host waits")
BEAMS = TTCConfig(branching_factor=4, seed=SEED, approach="beam", beam_width=2)


def main() -> int:
    """Returns the exit status: 1 if anything failed."""
    failed = bench(["all", "--gates", "--device", "cuda"]) != 0
    for check in (greedy, beams, recorded):
        try:
            said = check()
        except Exception as error:  # whatever a first run on a GPU raises
            failed, said = True, f"FAILED: {type(error).__name__}: {one_line(error)}"
        print(f"smoke/{check.__name__}: {said}", flush=True)
    return int(failed)


def greedy() -> str:
    """A greedy rollout is the CPU's and waits no more than it may."""
    return _rolled("greedy", lambda s: s.controller(s.fm).rollout)


def beams() -> str:
    """So is one with beams."""
    return _rolled("beams", lambda s: TTCBeam(s.fm, s.scorer, BEAMS).rollout)


def recorded() -> str:
    """A rollout whose step is recorded as a CUDA graph is the launched one, to the bit."""
    Setting(2, 4, "cuda", True).check_recorded()
    return "passed"


def _rolled(kind: str, roll: Callable[[Setting], Callable[[Tensor, int], Tensor]]) -> str:
    host, device = Setting(2, 4, "cpu", True), Setting(2, 4, "cuda", True)
    rollout, counts = roll(device), []
    torch.testing.assert_close(rollout(device.x, T).cpu(), roll(host)(host.x, T), rtol=1e-3, atol=1e-4)
    for steps in (T, 2 * T):
        with _waits() as waits:
            rollout(device.x, steps)
        counts.append(len(waits))
    found = (counts[1] - counts[0]) / T
    assert found <= MOST_WAITS[kind], f"a step waits {found:g} times for the GPU; at most {MOST_WAITS[kind]} is allowed"
    return f"passed; a step waits {found:g} times for the GPU"


@contextmanager
def _waits() -> Iterator[list[str]]:
    """Yield a list that holds, after the block, a line for each time the host waited in it."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [str(w.message) for w in seen if "synchronizing CUDA operation" in str(w.message)]


if __name__ == "__main__":
    sys.exit(main())
