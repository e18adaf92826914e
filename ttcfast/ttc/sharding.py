"""Runs one search in several processes, which divide the problems or the candidates of each step.

Candidates are keyed, so it does not matter which process draws them. With ``shard="candidates"`` the processes take turns at the chunks of
a step and each keeps its own best k; then scores and ids are gathered, every process finds the same k best of all, and all get each
survivor's state from the process that has it. Each does the rest (projection, fallback, history) for itself with the same result, to the
last bit where ``chunk_size`` or ``memory_budget`` fixes the shapes of the model's products, else to their rounding.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttcfast.ops.ranking import Keys, best
from ttcfast.runtime import distributed
from ttcfast.spec import TTCConfig
from ttcfast.stochastic_sampling.row_axis import over
from ttcfast.transfer import sent

from .budget import Budget
from .guardrails import DistinctWatch
from .result import RolloutResult
from .resume import settings_of_rollout
from .select.beams import BestOfBeams
from .select.keep import marked
from .select.topk import TopPool

_SUMS, _MOST = ("evaluations", "copies", "reward_evaluations", "solver_steps"), ("seconds", "peak_bytes", "searched")
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
    ends = [n * each // ranks for each in range(ranks + 1)]
    sizes = [after - before for before, after in itertools.pairwise(ends)]
    if not sizes[rank]:  # it rolls out the first problem and hands nothing on, for the shapes of what the others hand on
        return _joined(roll(x[:1], ids[:1], None), sizes)
    part = slice(ends[rank], ends[rank + 1])
    return _joined(roll(x[part], ids[part], None if resume is None else Path(resume) / f"rank{rank}"), sizes)


def merge(keep: BestOfBeams, watch: DistinctWatch | None, evaluations: int, min_spread: float) -> int:
    """Turn the selections of all ranks, each of its own chunks, into the selection from all chunks; and sum their evaluations."""
    if distributed.ranks() == 1:
        return evaluations
    keep.nonfinite, keep.unscored = distributed.reduced(torch.stack([keep.nonfinite, keep.unscored]), "sum")
    sums = map(int, distributed.totals([keep.reward_evaluations, keep.solver_steps, evaluations]))
    keep.reward_evaluations, keep.solver_steps, evaluations = sums
    present = ~keep.first.isnan().flatten(1).any(1) | keep.spread.first.isfinite()
    for name, how in _REDUCED.items():
        setattr(keep.spread, name, distributed.reduced(getattr(keep.spread, name), how))
    for pool in keep.pools:
        _merge_pool(pool)
    needed = keep.spread.collapsed(min_spread) | keep.spread.tied()
    needed[sent(keep.missed(), needed.device)] = True
    if len(rows := marked(needed)):
        at = sent(rows, needed.device)
        holders = torch.stack(distributed.beside(present[at].long()))  # [ranks, rows]
        own = keep.first[at]
        keep.first[at] = torch.where(over(holders.amax(0) > 0, own), distributed.shared_rows(own, holders.argmax(0)), own)
    if watch is not None:
        watch.projections = distributed.reduced(watch.projections, "sum")  # each was seen by one rank
        watch.at_once = int(distributed.total(watch.at_once, "max"))
    return evaluations


def _merge_pool(pool: TopPool) -> None:
    columns = {name: torch.cat(distributed.beside(value), 1) for name, value in pool.keys.columns().items()}
    found, index = best(Keys(**columns), pool.k)
    group = torch.arange(len(index), device=index.device).unsqueeze(1).expand_as(index)
    own = pool.states_of(group, index % pool.k).flatten(0, 1)  # also where nothing is taken
    pool.fill(found, distributed.shared_rows(own, (index // pool.k).flatten()).view_as(pool.states))
    pool.copies = distributed.reduced(pool.copies, "sum")


def _joined(own: RolloutResult, sizes: list[int]) -> RolloutResult:
    """The result of all problems from those of all ranks, which have ``sizes`` of them; a rank without problems has that of another."""
    steps = own.beams
    counts = distributed.gathered([_counts(part) for part in (own, *steps)] if sizes[distributed.rank()] else None)
    (of_all, *of_steps) = [_reduced(each) for each in zip(*(part for part in counts if part is not None))]
    tensors: dict[str, Any] = _tensors(own, sizes)
    if not steps:
        return dataclasses.replace(own, **tensors, **of_all)
    columns = _tensors(type(steps[0])(**{f.name: _over_time(steps, f.name) for f in dataclasses.fields(steps[0])}), sizes)
    beams: list[dict[str, Any]] = [{name: column.unbind(1)[t] for name, column in columns.items()} for t in range(len(steps))]
    joined = tuple(dataclasses.replace(step, **beam, **of_step) for step, beam, of_step in zip(steps, beams, of_steps))
    return dataclasses.replace(own, **tensors, **of_all, beams=joined)


def _over_time(steps: Sequence[Any], name: str) -> Any:
    """A field of all steps ``[n, T, ...]``, or of the first where it is no tensor with an entry for each problem."""
    values = [getattr(step, name) for step in steps]
    return torch.stack(values, 1) if isinstance(values[0], Tensor) and len(values[0]) else values[0]


def _tensors(part: Any, sizes: list[int]) -> dict[str, Tensor]:
    """The tensors of results of all ranks by name, apart from empty ones."""
    held = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    own = sizes[distributed.rank()]
    return {name: distributed.joined(v[:own], sizes) for name, v in held.items() if isinstance(v, Tensor) and len(v)}


def _counts(part: Any) -> dict[str, float | None]:
    return {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name in (*_SUMS, *_MOST)}


def _reduced(counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums or largest values of what all ranks count; None where one of them does not know."""
    columns = {name: [each[name] for each in counts] for name in counts[0]}
    return {name: None if None in column else sum(column) if name in _SUMS else max(column) for name, column in columns.items()}
