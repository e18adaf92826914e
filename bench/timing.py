"""Times a case: a correctness gate first, then all peers in turn, round after round, with the memory ceilings of the same rounds."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ttcfast.ops.registry import one_line

from . import environment
from .clocks import Clock, Run, clock_for
from .rows import GATE_FAILED, OK, PEER_FAILED, Row

__all__ = ["Case", "Problem", "Row", "measure"]

LEAST_SECONDS = 0.02  # shortest sample: a thousand times the cost of perf_counter and a wake-up of the system
MOST_LOOPS = 10_000
_READ, _COPY = "ceiling: read", "ceiling: copy"


@dataclass(frozen=True)
class Case:
    """One problem that several peers solve.

    Making a case must be cheap: tensors are made by ``check`` or a peer at its first call (``functools.cache``), so that listing a
    group allocates nothing. A peer that cannot run here is left out of ``peers``.

    Args:
        group: Group of the case, the name after ``bench_``.
        name: Name, unique within the group.
        shape: Shape to print, such as ``"[1, 256, 4, 128, 128]"``.
        dtype: Dtype to print, such as ``"float32"``.
        peers: By name, calls without arguments that all do the same work. On CUDA they only queue it. Gradients are enabled: a peer that
            needs none disables them itself.
        ours: Name in ``peers`` to which ratios refer.
        check: Raises unless all peers agree with the reference; called before any timing.
        bytes_moved: Fewest bytes that the work must read and write; None where bandwidth says nothing.
        note: Note for readers of the row, or a call that returns it once ``check`` has run.
        device: ``"cpu"`` or ``"cuda"``.
    """

    group: str
    name: str
    shape: str
    dtype: str
    peers: Mapping[str, Callable[[], Any]]
    ours: str
    check: Callable[[], None]
    bytes_moved: int | None = None
    note: str | Callable[[], str] = ""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.ours not in self.peers:
            raise ValueError(f"ours is {self.ours!r}; case {self.group}/{self.name} has the peers {', '.join(self.peers) or '(none)'}")


class Problem:
    """The problem that the peers of a case solve. A group's subclass creates its tensors on first use."""

    device: str

    def check(self, peers: Any) -> None:
        """Raise unless ``peers``, as for :meth:`case`, agree with the reference."""
        raise NotImplementedError

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def case(self, group: str, name: str, shape: str, dtype: str, peers: Mapping[str, Callable[[Any], Any]], **rest: Any) -> Case:
        """Return a case with ``peers``, functions of this problem, ours first; ``rest`` as for :class:`Case`."""
        calls = {peer: partial(function, self) for peer, function in peers.items()}
        return Case(group, name, shape, dtype, calls, next(iter(peers)), partial(self.check, peers), device=self.device, **rest)


@dataclass
class Contestant:
    """What is sampled once per round."""

    sample: Callable[[], float]
    loops: int
    seconds: list[float] = field(default_factory=list)

    def at(self, percent: float) -> float:
        return percentile(self.seconds, percent)


def measure(
    case: Case,
    *,
    rounds: int = 9,
    threads: int = 1,
    least_seconds: float = LEAST_SECONDS,
    quick: bool = False,
    clock: Clock | None = None,
) -> list[Row]:
    """Time every peer of ``case``.

    Args:
        case: Case to time.
        rounds: Samples of each peer.
        threads: Number of torch threads, during the check too, since Inductor compiles for a fixed number.
        least_seconds: Shortest duration of a sample, which sets its number of calls.
        quick: Value of ``quick`` in the rows.
        clock: Clock; None selects the one of the case's device.

    Returns:
        One row per peer, ours first. If the gate fails, one row with status ``"gate failed"`` and no times. A peer that raises has a row
        with status ``"peer failed"``.
    """
    if rounds < 1 or threads < 1:
        raise ValueError(f"rounds is {rounds} and threads is {threads}; both must be at least 1")
    clock = clock or clock_for(case.device)
    base = {
        **{name: getattr(case, name) for name in ("group", "shape", "dtype", "ours", "bytes_moved")},
        "case": case.name,
        "threads": threads,
        "quick": quick,
        **environment.columns(case.device),
    }
    with _threads(threads):
        forget_compiled()
        try:
            case.check()
        except Exception as error:  # gates fail by any exception
            return [Row(**base, peer=case.ours, status=GATE_FAILED, error=f"{type(error).__name__}: {one_line(error)}")]
        base["note"] = case.note() if callable(case.note) else case.note
        contestants, failures, notes = _contestants(case, clock, least_seconds)
        interleave(contestants, rounds)
    return [_row(base, name, contestants, failures, notes, rounds) for name in _ours_first(case)]


def forget_compiled() -> None:
    """Reset Dynamo, which counts recompilations per function, so that the cases of a group do not share one limit of eight."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def interleave(contestants: Mapping[Any, Contestant], rounds: int) -> None:
    """Sample each once per round. The first peer rotates, so that none always follows the same pause or runs first."""
    order = list(contestants.values())
    for turn in range(rounds):
        first = turn % len(order) if order else 0
        for contestant in [*order[first:], *order[:first]]:
            contestant.seconds.append(contestant.sample())


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the ``percent``-th percentile (0 to 100), interpolated linearly."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _contestants(case: Case, clock: Clock, least: float) -> tuple[dict[tuple[str, str], Contestant], dict[str, str], dict[str, str]]:
    """Return samples by (peer, kind), kind in "call", "graph" and "hot"; errors of peers that raised; reasons for missing graphs."""
    found: dict[tuple[str, str], Contestant] = {}
    failures: dict[str, str] = {}
    notes: dict[str, str] = {}
    for name, run in {**case.peers, **_ceilings(case)}.items():
        try:
            found[name, "call"] = _contestant(clock.sample, run, least)
        except Exception as error:  # a peer's failure (out of memory, no compiler) is recorded in its row; the others still run
            failures[name] = f"{type(error).__name__}: {one_line(error)}"
            continue
        if name in case.peers:
            replay, notes[name] = clock.graph_of(run)
            if replay is not None:
                found[name, "graph"] = _contestant(clock.sample, replay, least)
                found[name, "hot"] = _contestant(clock.hot_sample, replay, least)
    return found, failures, notes


def _contestant(sample: Callable[[Run, int], float], run: Run, least: float) -> Contestant:
    sample(run, 1)  # compiles, loads, fills caches
    once = min(sample(run, 1) for _ in range(2))
    loops = MOST_LOOPS if once * MOST_LOOPS <= least else max(1, math.ceil(least / once))
    return Contestant(lambda: sample(run, loops), loops)


def _ceilings(case: Case) -> dict[str, Run]:
    """Measure the read and copy bandwidth of this machine in the same rounds, with buffers of the case's size."""
    if not case.bytes_moved:
        return {}
    source = torch.rand(max(1, case.bytes_moved // 4), device=case.device)
    target = torch.empty_like(source)
    return {_READ: lambda: source.sum(), _COPY: lambda: target.copy_(source)}


def _row(
    base: Mapping[str, Any],
    name: str,
    contestants: Mapping[tuple[str, str], Contestant],
    failures: Mapping[str, str],
    notes: Mapping[str, str],
    rounds: int,
) -> Row:
    if name in failures:
        return Row(**base, peer=name, status=PEER_FAILED, error=failures[name])
    ours, call = base["ours"], contestants[name, "call"]
    values: dict[str, Any] = {"rounds": rounds, "loops": call.loops, "graph_note": notes[name]}
    for kind, prefix, ratio in (("call", "", "ratio"), ("graph", "graph_", "graph_ratio")):
        timed = contestants.get((name, kind))
        if timed is None:
            continue
        values |= {f"{prefix}p{percent}_us": 1e6 * timed.at(percent) for percent in (20, 50, 80)}
        if (ours, kind) in contestants:
            values[ratio] = timed.at(50) / contestants[ours, kind].at(50)
    hot, our_hot = contestants.get((name, "hot")), contestants.get((ours, "hot"))
    values["graph_hot_us"] = None if hot is None else 1e6 * hot.at(50)
    values["graph_hot_ratio"] = None if hot is None or our_hot is None else hot.at(50) / our_hot.at(50)
    return Row(**base, peer=name, status=OK, error="", **values, **_bandwidth(base["bytes_moved"], call, contestants))


def _bandwidth(moved: int | None, call: Contestant, contestants: Mapping[tuple[str, str], Contestant]) -> dict[str, Any]:
    if not moved:
        return {}
    values: dict[str, Any] = {"gb_per_s": moved / call.at(50) / 1e9}
    buffer = 4 * max(1, moved // 4)
    for ceiling, kind, size in ((_READ, "read", buffer), (_COPY, "copy", 2 * buffer)):
        if (ceiling, "call") in contestants:
            values[f"{kind}_gb_per_s"] = size / contestants[ceiling, "call"].at(50) / 1e9
            values[f"share_of_{kind}"] = values["gb_per_s"] / values[f"{kind}_gb_per_s"]
    return values


def _ours_first(case: Case) -> list[str]:
    return [case.ours, *(name for name in case.peers if name != case.ours)]


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
