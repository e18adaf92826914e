"""What one candidate costs in memory, measured: by torch's counters on a GPU, by the process's own high-water mark on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ttcfast.rewards.scorer import ScoreContext, Scorer
from ttcfast.spec import TTCConfig

from .models import Source
from .refine import refine_and_score

_SEEN = (
    16 << 20
)  # bytes by which a probe must raise the peak: far above the 1 MB or so by which a process's counted pages waver by themselves
_MOST = 256  # candidates that a probe draws at most
_RESET_PEAK = "5"  # what Linux wants written into /proc/self/clear_refs


def bytes_per_candidate(source: Source, scorer: Scorer, cfg: TTCConfig, window: Tensor, problem_ids: Tensor, *, first_id: int) -> int:
    """Bytes by which one candidate more raises the peak of generating and scoring a chunk.

    A small chunk of the first problem is generated and scored as a step does it; it is doubled until it shows, whatever
    ``cfg.memory_budget`` is: what does not show yet is small beside the process itself. Its evaluations are not counted, and its
    candidates, whose ids begin at ``first_id``, are thrown away.

    Args:
        source, scorer: of the candidates and of their scores.
        cfg: the seed, and how candidates are refined.
        window: states to start from, ``[n, C, *S]`` (``[n, h, C, *S]`` with history).
        problem_ids: int64 ``[n]``, for the scorer's context.
        first_id: ids from here on are used by no group.

    Returns:
        At least the bytes of a state and of its successor, which no measurement may undercut.
    """
    state = window[0, -1] if source.history > 1 else window[0]
    least, count = 2 * state.numel() * state.element_size(), 1

    def chunk(size: int) -> None:
        ids = torch.arange(first_id, first_id + size)
        drawn = source.candidates(window[:1], ids, problem_ids[:1], seed=cfg.seed, step=1)
        x = window[:1, -1] if source.history > 1 else window[:1]
        context = ScoreContext(0, problem_ids[:1])
        refine_and_score(x, drawn, scorer, context, cfg, source.spec)

    with torch.no_grad():
        chunk(1)  # what is built at the first call (kernels, buffers) is no candidate's
        while True:
            growth = _peak_growth(partial(chunk, count), window.device)
            if growth >= _SEEN or count >= _MOST:
                return max(least, -(-growth // count))
            count *= 2


def peak_bytes(device: torch.device) -> int | None:
    """The most memory held since ``reset_peak`` on a GPU, else since the process began; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device: torch.device) -> None:
    """Start counting anew, where that is possible without disturbing others."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_growth(run: Callable[[], None], device: torch.device) -> int:
    """By how many bytes the peak during ``run`` exceeds what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: what the heap keeps free would be filled first, unseen
    before = _resident()
    run()
    return max(0, _peak() - before)


def _resident() -> int:
    """Bytes held now, and the high-water mark set back to them; where the system cannot do that, the mark as it is."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write(_RESET_PEAK)
        return _status("VmRSS:")
    except OSError:
        return _peak()


def _peak() -> int:
    try:
        return _status("VmHWM:")
    except OSError:
        return peak_bytes(torch.device("cpu")) or 0


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next((line for line in file if line.startswith(field)), None)
    if line is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(line.split()[1]) * 1024
