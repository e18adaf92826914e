"""Limits chunks by the memory of one candidate, which torch's counters tell on a GPU and the process's high-water mark on a CPU.

Without a limit in the configuration, a CPU makes as many candidates at once as is fastest (``chunk_speed.py``).
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ttcfast.rewards.scorer import Scorer
from ttcfast.runtime import distributed
from ttcfast.spec import TTCConfig

from .chunk_speed import fastest_chunk
from .models import Source
from .refine import refine_and_score

_SEEN = 16 << 20  # smallest rise of the peak, in bytes, that a probe accepts: far above the 1 MB by which a process's page count fluctuates
_MOST = 256  # largest number of candidates in a probe
_RESET_PEAK = "5"  # written to /proc/self/clear_refs to reset the peak


class ChunkLimit:
    """The number of candidates that one chunk may hold; what has to be measured is measured once.

    Args:
        source, scorer: Source of the candidates, and their scorer.
        cfg: Configuration; ``chunk_size`` and ``memory_budget`` are used.
    """

    def __init__(self, source: Source, scorer: Scorer, cfg: TTCConfig) -> None:
        self._source, self._scorer, self._cfg = source, scorer, cfg
        self._each: int | None = None

    def of(self, window: Tensor, problem_ids: Tensor) -> int | None:
        """The limit, None for none, measured where there is a memory budget or no limit; see ``bytes_per_candidate``, ``fastest_chunk``.

        Raises:
            ValueError: The memory budget is below one candidate.
        """
        cfg = self._cfg
        if cfg.memory_budget is None:
            return self._fastest(window, problem_ids) if cfg.chunk_size is None else cfg.chunk_size
        if self._each is None:
            measured = bytes_per_candidate(self._source, self._scorer, cfg, window, problem_ids)
            self._each = measured if cfg.shard is None else int(distributed.total(measured, "max"))
        count = cfg.memory_budget // self._each
        if count < 1:
            raise ValueError(
                f"memory_budget is {cfg.memory_budget} bytes and generating and scoring one candidate takes {self._each}; give at least "
                "that"
            )
        count = 1 << (count.bit_length() - 1)  # the measurement varies by a page or two, but the chunks should not
        return count if cfg.chunk_size is None else min(count, cfg.chunk_size)

    def _fastest(self, window: Tensor, problem_ids: Tensor) -> int | None:
        """The fastest size, made smaller where the last chunk would else be filled up."""
        size, cfg = fastest_chunk(self._source, self._cfg, window, problem_ids), self._cfg
        if size is None or self._scorer.needs_group:
            return size if size is None else max(size, cfg.branching_factor)
        problems = min(size, len(window) * cfg.beam_width)
        apart = 0 if self._source.joint else 1  # the deterministic step, where it is made by itself
        drawn = max(1, cfg.branching_factor - apart)
        return problems * -(-drawn // -(-drawn // (size // problems)))


def bytes_per_candidate(source: Source, scorer: Scorer, cfg: TTCConfig, window: Tensor, problem_ids: Tensor) -> int:
    """Bytes by which one more candidate raises the peak of generating and scoring a chunk.

    A small chunk of the first problem is generated and scored as in a step, and doubled until it shows, whatever the memory budget is: what
    does not show is small beside the process itself. These evaluations are not counted and the candidates, whose ids no group draws, are
    thrown away.

    Args:
        source, scorer: Source of the candidates, and their scorer.
        cfg: Configuration; the random seed and the refinement are used.
        window: States to start from, ``[n, C, *S]`` (``[n, h, C, *S]`` with history).
        problem_ids: int64 ``[n]``, for the scorer's context.

    Returns:
        At least the bytes of a state and of its successor, which no measurement may undercut.
    """
    x = window[:1, -1] if source.history > 1 else window[:1]
    least, count = 2 * x.numel() * x.element_size(), 1
    first, known = (cfg.max_resample + 3) * cfg.beam_width * cfg.branching_factor, problem_ids[:1].cpu()

    def chunk(size: int) -> None:
        drawn = source.candidates(window[:1], torch.arange(first, first + size), known, seed=cfg.seed, step=1)
        spec = None if source.spec is None else source.spec.to(x.device)
        refine_and_score(x, drawn, scorer, source.context(1, problem_ids[:1], known), cfg, spec)

    with torch.no_grad():
        chunk(1)  # kernels and buffers created by the first call are not due to candidates
        while True:
            growth = _peak_growth(partial(chunk, count), window.device)
            if growth >= _SEEN or count >= _MOST:
                return max(least, -(-growth // count))
            count *= 2


def peak_bytes(device: torch.device) -> int | None:
    """Most memory held since ``reset_peak``: by tensors on a GPU, by the whole process on a CPU, whose count else begins with the process.

    None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status("VmHWM:")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device: torch.device) -> bool:
    """Restart the count of ``peak_bytes``; return whether the system can, which on a CPU takes Linux and a writable /proc."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc would fill the free part of the heap first, which goes unmeasured
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write(_RESET_PEAK)
    except OSError:
        return False
    return True


def _peak_growth(run: Callable[[], None], device: torch.device) -> int:
    """Return the bytes by which the peak during ``run`` exceeds the memory held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        reset_peak(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = (_status("VmRSS:") if reset_peak(device) else peak_bytes(device)) or 0
    run()
    return max(0, (peak_bytes(device) or 0) - before)


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next((line for line in file if line.startswith(field)), None)
    if line is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(line.split()[1]) * 1024
