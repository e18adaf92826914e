"""Comparison of runs: the configuration keys that differ, and the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ttcfast.report.figures.lines import Line, line_figure

from .html import MISSING, Cell, Markup, joined, number, short, table, tag
from .methods import Method, baseline_of, best_reward, name_of
from .pictures import drawn
from .runs import Run

MOST_KEYS = 8
_ALWAYS_DIFFER = ("out",)  # where a run wrote says nothing about it


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the configuration keys that differ between runs, each with its values in the order of the runs; None for a missing key."""
    configs = [run.config for run in runs]
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if key not in _ALWAYS_DIFFER]
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: held for key, held in values.items() if len({json.dumps(v, sort_keys=True) for v in held}) > 1}


def ablation(runs: Sequence[Run], title: str, anchors: Sequence[str]) -> Markup:
    """Tabulate per run the values of the keys that differ, and the error of every method over that of the deterministic step.

    Args:
        runs: Two or more runs of ``run_ttc``.
        title: Title of the section.
        anchors: Anchors of the sections of the runs.
    """
    keys = differing(runs)
    shown = list(keys)[:MOST_KEYS]
    names: dict[str, Method] = {}
    for run in runs:
        names |= {name_of(m): m for m in run.metrics["methods"] if name_of(m) not in (*names, "deterministic")}
    rows = []
    for i, run in enumerate(runs):
        methods = {name_of(m): m for m in run.metrics["methods"]}
        winner, base = best_reward(run.metrics["methods"]), baseline_of(run.metrics["methods"])["rollout_mse"]
        ratios = [_ratio(methods.get(name), base, winner) for name in names]
        values = [_value(keys[key][i]) for key in shown]
        rows.append([Cell(tag("a", run.name, href=f"#{anchors[i]}")), *values, number(run.metrics["problems"]), number(base), *ratios])
    notes = ["Cells: rollout MSE over that of the run's own deterministic step; below 1 is a gain. Marked: the run's best reward."]
    if len(keys) > len(shown):
        notes.append(f"{len(keys) - len(shown)} more keys differ: {', '.join(list(keys)[MOST_KEYS:])}.")
    if not keys:
        notes.append("The runs have the same configuration but for where they wrote.")
    heads = ["run", *shown, "problems", "deterministic MSE", *names]
    return joined(
        tag("h2", title),
        tag("ul", [tag("li", note) for note in notes], class_="notes"),
        table(f"{title}: the keys that differ, and what came of them", heads, rows),
        _curve(runs, keys),
    )


def _ratio(method: Method | None, base: float | None, winner: Method | None) -> Cell:
    if method is None or method["rollout_mse"] is None or not base:
        return Cell(MISSING if method is None or not method["blown_up"] else "blew up")
    return number(method["rollout_mse"] / base, best=method is winner)


def _value(value: Any) -> Cell:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Cell(short(value) if isinstance(value, float) else str(value), float(value))
    return Cell("null" if value is None else value if isinstance(value, str) else json.dumps(value))


def _curve(runs: Sequence[Run], keys: dict[str, list[Any]]) -> Markup | None:
    """Draw the errors against the key, if a single numeric key differs between at least three runs and no value repeats."""
    if len(keys) != 1 or len(runs) < 3:
        return None
    ((key, values),) = keys.items()
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values) or len(set(values)) < len(values):
        return None
    order = sorted(range(len(runs)), key=lambda i: values[i])
    lines: dict[str, tuple[Method, dict[float, float]]] = {}
    for i in order:
        base = baseline_of(runs[i].metrics["methods"])["rollout_mse"]
        for m in runs[i].metrics["methods"]:
            if base and m["rollout_mse"] is not None:
                lines.setdefault(name_of(m), (m, {}))[1][values[i]] = m["rollout_mse"] / base
    drawable = [Line(name, list(held), list(held.values()), m["method"], m["projection"]) for name, (m, held) in lines.items()]
    log = min(values) > 0 and max(values) >= 8 * min(values)
    ticks = sorted(values) if len(values) <= 8 else None
    options: dict[str, Any] = {"xlabel": key, "ylabel": "MSE / deterministic", "log": log, "ticks": ticks}
    return tag("div", drawn(line_figure(f"Error against {key}", drawable, **options)), class_="charts")
