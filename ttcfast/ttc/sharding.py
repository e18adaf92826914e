"""One search in several processes: the problems, or the candidates of each step, divided among them.

Candidates are keyed, so it does not matter which process draws them. With ``shard="candidates"`` the chunks of a step go round the
processes and each keeps its own best k; then scores and ids alone are gathered, every process finds the same k best of all, and each
survivor's state is broadcast by the process that has it. What follows (projection, fallback, history) each does for itself, with the same
result: to the last bit where ``chunk_size`` or ``memory_budget`` fixes the shapes of the model's products, else to their rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ttcfast.runtime import distributed
from ttcfast.spec import TTCConfig

from .budget import Budget
from .result import RolloutResult
from .select.beams import StepSearch
from .select.topk import Keys, TopPool, best
from .settings import checksum_of

SHARDS = (None, "problems", "candidates")
_REDUCED = dict.fromkeys(("highest", "size", "rest", "opening", "first", "floor"), "max") | {"lowest": "min", "count": "sum"}  # of Spread


def share(cfg: TTCConfig) -> tuple[int, int]:
    """(rank, ranks) by which the chunks of a step are divided."""
    return (distributed.rank(), distributed.ranks()) if cfg.shard == "candidates" else (0, 1)


def part_of(n: int, cfg: TTCConfig) -> slice:
    """The problems, of ``n``, that this process rolls out."""
    if cfg.shard != "problems":
        return slice(0, n)
    rank, ranks = distributed.rank(), distributed.ranks()
    return slice(n * rank // ranks, n * (rank + 1) // ranks)


def check_ranks(
    cfg: TTCConfig, x0: Tensor, T: int, problem_ids: Tensor, budget: Budget | None, describe: Callable[[], Mapping[str, Any]]
) -> None:
    """Raise one ``ValueError`` on all ranks unless all roll out the same problems in the same way.

    A search with ``shard=None`` is its process's own affair and is compared with none. All ranks must therefore set the same kind of
    shard or none: those that share would wait for one that does not until the process group's timeout.

    Args:
        cfg, x0, T, problem_ids, budget: of the rollout.
        describe: gives the settings of model and scorers; asked only where ranks are compared.
    """
    if cfg.shard is None or distributed.ranks() == 1:
        return
    given = {f"cfg.{f.name}": getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    given |= {"x0": checksum_of(x0), "T": T, "problem_ids": problem_ids.tolist(), "budget": budget}
    distributed.require_equal({**given, **describe()})


def merge(search: StepSearch, min_spread: float) -> None:
    """Make the searches of all ranks, each of its own chunks, the search of all chunks."""
    if distributed.ranks() == 1:
        return
    search.nonfinite = distributed.reduced(search.nonfinite, "sum")
    search.unscored = distributed.reduced(search.unscored, "sum")
    search.rewarded = int(distributed.total(search.rewarded))
    present = ~search.first.isnan().flatten(1).any(1) | search.spread.first.isfinite()
    for name, how in _REDUCED.items():
        setattr(search.spread, name, distributed.reduced(getattr(search.spread, name), how))
    for pool in search.pools:
        _merge_pool(pool)
    needed = search.spread.collapsed(min_spread) | search.spread.tied()
    needed[search.rows_of(search.missed())] = True
    rows = needed.nonzero().flatten()
    if len(rows):
        holders = torch.stack(distributed.beside(present[rows].long()))  # [ranks, rows]
        held = holders.amax(0) > 0
        owner = holders.argmax(0)
        search.first[rows[held]] = distributed.shared_rows(search.first[rows[held]], owner[held])


def _merge_pool(pool: TopPool) -> None:
    columns = {name: torch.cat(distributed.beside(value), 1) for name, value in pool.keys.columns().items()}
    found, index = best(Keys(**columns), pool.k)
    group, place = (found.rank > -torch.inf).nonzero(as_tuple=True)
    at = index[group, place]
    owner = at // pool.k
    own = pool.states_of(group, at % pool.k)
    pool.fill(found, group, place, distributed.shared_rows(own, owner))
    pool.copies = int(distributed.total(pool.copies))


def everyones(own: RolloutResult | None, device: torch.device) -> RolloutResult:
    """The results of all processes, each of its problems, as one, on all of them; None of a process that has no problem."""
    found = [p for p in distributed.gathered(None if own is None else _on(own, torch.device("cpu"))) if p is not None]
    return _on(_joined(found), device)


def _on(value: Any, device: torch.device) -> Any:
    """A result, or a step of one, with its tensors on ``device``."""
    moved = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in moved.items()}
    if "beams" in moved:
        moved["beams"] = tuple(_on(step, device) for step in moved["beams"])
    return type(value)(**moved)


def _joined(found: Sequence[RolloutResult]) -> RolloutResult:
    values: dict[str, Any] = {}
    for f in dataclasses.fields(RolloutResult):
        columns = [getattr(p, f.name) for p in found]
        if isinstance(columns[0], Tensor):
            values[f.name] = torch.cat(columns)
        elif f.name in ("nfe", "copies", "reward_evaluations"):
            values[f.name] = None if None in columns else sum(columns)
        elif f.name == "beams":
            values[f.name] = tuple(_joined_steps(steps) for steps in zip(*columns))
        elif f.name in ("seconds", "peak_bytes", "searched"):
            values[f.name] = None if None in columns else max(columns)
        else:
            values[f.name] = columns[0]
    return RolloutResult(**values)


def _joined_steps(steps: Sequence[Any]) -> Any:
    values: dict[str, Any] = {}
    for f in dataclasses.fields(steps[0]):
        columns = [getattr(s, f.name) for s in steps]
        if isinstance(columns[0], Tensor):
            values[f.name] = torch.cat(columns)
        else:
            values[f.name] = columns[0] if columns[0] is None or f.name in ("step", "searched") else sum(columns)
    return type(steps[0])(**values)
