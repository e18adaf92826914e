"""Measures how many candidates a CPU makes fastest at once: enough to fill its vectors, few enough for its caches."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ttcfast.core.base_fm import Surrogate
from ttcfast.spec import TTCConfig

from .models import Source

logger = logging.getLogger(__name__)

LEAST = 64  # candidates of a step from which measuring pays: it costs about as many
_FIRST = 8  # candidates of the first measurement
_BETTER = 0.95  # share of the time that another size must stay below to be taken


class _Measured(NamedTuple):
    size: int | None  # None: all at once
    most: int  # candidates of a step when it was measured


_sizes: WeakKeyDictionary[Surrogate, dict[tuple[Any, ...], _Measured]] = WeakKeyDictionary()


def fastest_chunk(source: Source, cfg: TTCConfig, window: Tensor, problem_ids: Tensor) -> int | None:
    """Returns the number of candidates to make at once on a CPU, or None for all of a step.

    A few candidates are made and thrown away, in chunks of 8, then of more or fewer by factors of 2 as long as each takes less time.
    A surrogate and a shape are measured once per process. Only where chunks change nothing but rounding: for a ``Surrogate`` that draws by
    keys alone. Searches in several processes, which must have equal chunks, and particles, which would be made again, are not measured.

    Args:
        source: Source of the candidates.
        cfg: Configuration of the search.
        window: States to start from, ``[n, C, *S]`` (``[n, h, C, *S]`` with history).
        problem_ids: int64 ``[n]``.
    """
    most, fm = len(window) * cfg.beam_width * cfg.branching_factor, source.timed
    if fm is None or window.device.type != "cpu" or cfg.shard is not None or cfg.approach == "particle" or most < LEAST:
        return None
    held = _sizes.setdefault(fm, {})
    problems = min(len(window), _FIRST)
    key = (window.shape[1:], window.dtype, repr(source.stochastic), problems, torch.get_num_threads())
    known = held.get(key)
    if known is None or (known.size is None and known.most < most):
        eager = fm.variant(compile=False) if fm.compiled else fm  # a compilation of every size would cost more than it tells
        known = held[key] = _Measured(_measured(eager, source, cfg, window, problem_ids, most), most)
    return None if known.size is None or known.size >= most else known.size


def _measured(fm: Surrogate, source: Source, cfg: TTCConfig, window: Tensor, problem_ids: Tensor, most: int) -> int | None:
    given: dict[str, Any] = {"step": 1, "stochastic": source.stochastic}

    def seconds(size: int) -> float:
        """Time of one candidate among ``size``."""
        n = min(len(window), size)
        x, ids, known = window[:n], torch.arange(1, 1 + size // n), problem_ids[:n].cpu()
        began = time.perf_counter()
        fm.candidates(x, ids, problem_ids=known, seed=cfg.seed, **given)
        return (time.perf_counter() - began) / (n * len(ids))

    try:
        seconds(_FIRST)  # compiles kernels and traces the model
        if not fm.draws_by_key(window[:1], problem_ids=problem_ids[:1], **given):
            return None
        size = fastest(lambda size: min(seconds(size), seconds(size)), most)
    except Exception:  # the model's own errors recur in the search, which knows what to say
        return None
    logger.info("%s: %s candidates at once are fastest", type(fm.model).__name__, "all" if size is None else size)
    return size


def fastest(seconds: Callable[[int], float], most: int) -> int | None:
    """Returns the size with the least ``seconds(size)`` per candidate, by factors of 2 from 8; None if it is ``most`` or more."""
    best, least = _FIRST, seconds(_FIRST)
    for sizes in (itertools.takewhile(lambda size: size <= most, (_FIRST << k for k in itertools.count(1))), (4, 2, 1)):
        for size in sizes:
            if (found := seconds(size)) > _BETTER * least:
                break
            best, least = size, found
        else:
            if best > _FIRST:  # still getting faster
                return None
        if best != _FIRST:
            break
    return best
