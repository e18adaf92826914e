"""Clocks for a call: host time, time between CUDA events with a flushed L2, and replays as a CUDA graph."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ttcfast.ops.registry import one_line
from ttcfast.runtime.errors import ArgumentError

Run = Callable[[], Any]
LEAST_FLUSH_BYTES = 256 * 2**20


class Clock(Protocol):
    """The interface that ``measure`` needs of a clock; tests pass their own."""

    def sample(self, run: Run, loops: int) -> float:
        """Return the mean seconds of ``loops`` calls of ``run``."""

    def graph_of(self, run: Run) -> tuple[Run | None, str]:
        """Return a call that replays ``run`` as a graph, or None, with the reason."""

    def hot_sample(self, run: Run, loops: int) -> float:
        """As ``sample``, with the calls back to back."""


class HostClock:
    """The host's clock around ``loops`` calls."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def sample(self, run: Run, loops: int) -> float:
        start = self._now()
        for _ in range(loops):
            run()
        return (self._now() - start) / loops

    hot_sample = sample

    def graph_of(self, run: Run) -> tuple[Run | None, str]:
        return None, ""


class EventClock:
    """CUDA events on the current stream.

    The flush reads a buffer of several L2 sizes, so it leaves no dirty lines whose write-back the timed call would pay for. It also keeps
    the device busy while the host queues the call, so short calls show their device time. Where the host is slower than that (many small
    kernels), the number includes the gaps, as real use does.
    """

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.ones(max(LEAST_FLUSH_BYTES, 4 * l2) // 4, device="cuda")
        self._sum = torch.zeros((), device="cuda")
        self._pool = torch.cuda.graph_pool_handle()

    def sample(self, run: Run, loops: int) -> float:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(loops)]
        torch.cuda.synchronize()
        for start, end in events:
            torch.sum(self._flush, 0, out=self._sum)
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / loops / 1e3

    def hot_sample(self, run: Run, loops: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(loops):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / loops / 1e3

    def graph_of(self, run: Run) -> tuple[Run | None, str]:
        """Capture one call. Graphs share a memory pool, since each writes its temporaries before reading them and no result is read."""
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        try:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # warm up on a side stream, as torch's CUDA graph notes require
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            with warnings.catch_warnings():
                # A call that does no work on the device yields an empty graph, whose replay takes no time.
                warnings.filterwarnings("error", message=".*[Gg]raph is empty")
                with torch.cuda.graph(graph, pool=self._pool):
                    run()
            graph.replay()
            torch.cuda.synchronize()
        except Exception as error:  # any operation that a capture forbids
            torch.cuda.synchronize()
            return None, f"not capturable: {one_line(error)[:160]}"
        return graph.replay, ""


def clock_for(device: str) -> Clock:
    """Return the clock of ``"cpu"`` or ``"cuda"``.

    Raises:
        ArgumentError: ``device`` is ``"cuda"`` and torch finds no CUDA device.
    """
    if device == "cpu":
        return HostClock()
    if not torch.cuda.is_available():
        raise ArgumentError("device is 'cuda' and torch sees no CUDA device; use --device cpu")
    return EventClock()
