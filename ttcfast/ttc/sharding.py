"""Runs one search in several processes, which divide the problems or the candidates of each step.

Candidates are keyed, so it does not matter which process draws them. With ``shard="candidates"`` the processes take turns at the chunks of
a step and each keeps its own best k; then scores and ids are gathered, every process finds the same k best of all, and the process that
has a survivor's state broadcasts it. Each process does the rest (projection, fallback, history) for itself with the same result, to the
last bit where ``chunk_size`` or ``memory_budget`` fixes the shapes of the model's products, else to their rounding.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttcfast.ops.ranking import Keys, best
from ttcfast.runtime import distributed
from ttcfast.spec import TTCConfig

from .budget import Budget
from .guardrails import DistinctWatch
from .result import RolloutResult
from .resume import moved, settings_of_rollout
from .select.beams import BestOfBeams
from .select.topk import TopPool

_SUMS = ("evaluations", "copies", "reward_evaluations", "solver_steps")
_REDUCED = dict.fromkeys(("highest", "size", "rest", "opening", "first"), "max") | {"lowest": "min", "count": "sum"}  # of Spread


def share(cfg: TTCConfig) -> tuple[int, int]:
    """The (rank, ranks) by which the chunks of a step are divided."""
    return (distributed.rank(), distributed.ranks()) if cfg.shard == "candidates" else (0, 1)


def check_ranks(
    cfg: TTCConfig, x0: Tensor, T: int, problem_ids: Tensor, budget: Budget | None, describe: Callable[[], Mapping[str, Any]]
) -> None:
    """Raise one ``ValueError`` on all ranks unless all roll out the same problems in the same way.

    A search with ``shard=None`` belongs to its process alone and is not compared. All ranks must therefore set the same kind of shard or
    none: those that share would wait for one that does not until the process group's timeout.

    Args:
        cfg, x0, T, problem_ids, budget: As for the rollout.
        describe: Returns the settings of model and scorers; asked only where ranks are compared.
    """
    if cfg.shard is None or distributed.ranks() == 1:
        return
    distributed.require_equal({**settings_of_rollout(cfg, x0, T, problem_ids, budget), **describe()})


def in_parts(
    roll: Callable[..., RolloutResult], x: Tensor, ids: Tensor, cfg: TTCConfig, budget: Budget | None, resume: str | os.PathLike[str] | None
) -> RolloutResult:
    """Roll all problems out, with ``shard="problems"`` each process its own.

    Args:
        roll: Rolls out states ``x``, problems ``ids`` and a folder to resume from.
        x, ids: States and numbers of all problems.
        cfg, budget, resume: As for the rollout.

    Returns:
        The result of all problems, on every process.

    Raises:
        ValueError: There is a budget, and problems are divided.
    """
    rank, ranks, n = distributed.rank(), distributed.ranks(), len(x)
    if cfg.shard != "problems" or ranks == 1:
        return roll(x, ids, resume)
    if budget is not None:
        raise ValueError(
            f"budget is {budget} and shard 'problems': no rank knows what the others spend; use shard='candidates', or no budget"
        )
    part = slice(n * rank // ranks, n * (rank + 1) // ranks)
    own = roll(x[part], ids[part], None if resume is None else Path(resume) / f"rank{rank}") if part.stop > part.start else None
    found = [p for p in distributed.gathered(None if own is None else moved(own, torch.device("cpu"))) if p is not None]
    result: RolloutResult = moved(_joined(found), x.device)
    return result


def merge(keep: BestOfBeams, watch: DistinctWatch | None, evaluations: int, min_spread: float) -> int:
    """Turn the selections of all ranks, each of its own chunks, into the selection from all chunks; and sum their evaluations."""
    if distributed.ranks() == 1:
        return evaluations
    keep.nonfinite = distributed.reduced(keep.nonfinite, "sum")
    keep.unscored = distributed.reduced(keep.unscored, "sum")
    keep.reward_evaluations = int(distributed.total(keep.reward_evaluations))
    keep.solver_steps = int(distributed.total(keep.solver_steps))
    present = ~keep.first.isnan().flatten(1).any(1) | keep.spread.first.isfinite()
    for name, how in _REDUCED.items():
        setattr(keep.spread, name, distributed.reduced(getattr(keep.spread, name), how))
    for pool in keep.pools:
        _merge_pool(pool)
    needed = keep.spread.collapsed(min_spread) | keep.spread.tied()
    needed[keep.missed()] = True
    rows = needed.nonzero().flatten()
    if len(rows):
        holders = torch.stack(distributed.beside(present[rows].long()))  # [ranks, rows]
        held = holders.amax(0) > 0
        owner = holders.argmax(0)
        keep.first[rows[held]] = distributed.shared_rows(keep.first[rows[held]], owner[held])
    if watch is not None:
        watch.projections = distributed.reduced(watch.projections, "sum")  # each was seen by one rank
        watch.at_once = int(distributed.total(watch.at_once, "max"))
    return int(distributed.total(evaluations))


def _merge_pool(pool: TopPool) -> None:
    columns = {name: torch.cat(distributed.beside(value), 1) for name, value in pool.keys.columns().items()}
    found, index = best(Keys(**columns), pool.k)
    group, place = (found.rank > -torch.inf).nonzero(as_tuple=True)
    at = index[group, place]
    owner = at // pool.k
    own = pool.states_of(group, at % pool.k)
    pool.fill(found, group, place, distributed.shared_rows(own, owner))
    pool.copies = int(distributed.total(pool.copies))


def _joined(parts: Sequence[Any]) -> Any:
    """Concatenate results, or steps, of several parts of the problems."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(parts[0]):
        columns = [getattr(p, f.name) for p in parts]
        if isinstance(columns[0], Tensor):
            values[f.name] = torch.cat(columns)
        elif f.name == "beams":
            values[f.name] = tuple(map(_joined, zip(*columns)))
        elif f.name in _SUMS:
            values[f.name] = None if None in columns else sum(columns)
        elif f.name in ("seconds", "peak_bytes", "searched"):
            values[f.name] = None if None in columns else max(columns)
        else:
            values[f.name] = columns[0]
    return type(parts[0])(**values)
