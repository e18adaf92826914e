"""The CSV schema of all groups, one row per case, peer and number of threads; see ``bench/results/README.md``."""

from __future__ import annotations

import csv
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ttcfast.runtime.files import write_csv

OK, GATE_FAILED, PEER_FAILED = "ok", "gate failed", "peer failed"


@dataclass(frozen=True)
class Row:
    """A measurement, or the reason why there is none. None is an empty cell and means "not measured", never zero.

    Args:
        group, case, shape, dtype, peer: What was timed; ratios refer to the peer ``ours``.
        status: ``"ok"``, ``"gate failed"`` (the peers disagreed, so nothing was timed) or ``"peer failed"``; ``error`` gives details.
        device: ``"cpu"`` or ``"cuda"``; ``device_name`` is its model.
        rounds, loops: Number of samples, and of calls averaged in each.
        p20_us, p50_us, p80_us: Microseconds per call; on CUDA between two events, with a flushed L2.
        ratio: This peer's ``p50_us`` over that of ``ours``, so above 1 where ours is faster.
        bytes_moved: Fewest bytes that the operation must read and write; ``gb_per_s`` is that over ``p50_us``.
        read_gb_per_s, copy_gb_per_s: Bandwidth of ``torch.sum`` and ``copy_`` (read plus written) on ``bytes_moved``, in the same rounds.
        share_of_read, share_of_copy: ``gb_per_s`` over these.
        graph_p20_us, graph_p50_us, graph_p80_us, graph_ratio: The same for replays of a CUDA graph of one call, with a flushed L2.
        graph_hot_us, graph_hot_ratio: Median of such replays back to back, with a warm L2.
        graph_note: Why there is no graph.
        peak_mb: Peak memory of a separate process in MiB; such a row has no times.
        quick: Whether samples were short and few, as a smoke test; such figures are not to be quoted.
    """

    group: str
    case: str
    shape: str
    dtype: str
    peer: str
    ours: str
    status: str
    error: str
    device: str
    device_name: str
    threads: int
    rounds: int | None = None
    loops: int | None = None
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    ratio: float | None = None
    bytes_moved: int | None = None
    gb_per_s: float | None = None
    read_gb_per_s: float | None = None
    copy_gb_per_s: float | None = None
    share_of_read: float | None = None
    share_of_copy: float | None = None
    graph_p20_us: float | None = None
    graph_p50_us: float | None = None
    graph_p80_us: float | None = None
    graph_ratio: float | None = None
    graph_hot_us: float | None = None
    graph_hot_ratio: float | None = None
    graph_note: str = ""
    note: str = ""
    quick: bool = False
    cpu: str = ""
    gpu: str = ""
    driver: str = ""
    python: str = ""
    torch: str = ""
    triton: str = ""
    ttcfast: str = ""
    commit: str = ""
    dirty: bool | None = None
    date: str = ""
    peak_mb: float | None = None


COLUMNS = tuple(field.name for field in fields(Row))


def write(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Write ``rows`` as CSV, atomically. Numbers have six significant digits, well below the timing noise.

    Raises:
        OutputError: The file cannot be written.
    """
    write_csv(path, [{name: _cell(getattr(row, name)) for name in COLUMNS} for row in rows])


def read(path: str | os.PathLike[str]) -> list[Row]:
    """Read the rows of a file written by ``write``.

    Raises:
        ValueError: Its columns differ from those of ``Row``.
    """
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) not in (COLUMNS, COLUMNS[:-1]):  # files written before peak_mb existed
            odd = set(reader.fieldnames or ()) ^ set(COLUMNS)
            raise ValueError(f"{os.fspath(path)} has other columns than bench.rows.Row: {sorted(odd) or 'another order'}; measure it again")
        hints = typing.get_type_hints(Row)
        return [Row(**{name: _value(line, name, hints) for name in COLUMNS if name in line}) for line in reader]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


def _value(line: Mapping[str, str], name: str, hints: Mapping[str, Any]) -> Any:
    text, hint = line[name], hints[name]
    optional = isinstance(hint, types.UnionType)
    kind = typing.get_args(hint)[0] if optional else hint
    if text == "" and optional:
        return None
    return text == "true" if kind is bool else kind(text)
