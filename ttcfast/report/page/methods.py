"""Tables of the section of a run of ``run_ttc`` or ``demo``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ttcfast.evaluation.results import LABELS, chooses_by_reward
from ttcfast.evaluation.table import MEGABYTE, PEAK, in_words, percent

from .html import MISSING, Cell, Markup, joined, number, short, table, tag

Method = Mapping[str, Any]


def name_of(method: Method) -> str:
    return LABELS.get(method["method"], str(method["method"])) + (" + projection" if method["projection"] else "")


def baseline_of(methods: Sequence[Method]) -> Method:
    """Return the deterministic rollout, the reference of the gains."""
    return next((m for m in methods if m["method"] == "deterministic" and not m["projection"]), methods[0])


def best_reward(methods: Sequence[Method]) -> Method | None:
    """Return the method with the smallest error among those that choose by a reward, or None."""
    chosen = [m for m in methods if chooses_by_reward(m["method"]) and not m.get("recorded") and m["rollout_mse"] is not None]
    return min(chosen, key=lambda m: m["rollout_mse"], default=None)


def headline(metrics: Mapping[str, Any]) -> Markup:
    """Summarise the run: the error of the best reward, the share of problems it improves, and the error of the oracle."""
    methods, n = metrics["methods"], metrics["problems"]
    base, best = baseline_of(methods)["rollout_mse"], best_reward(methods)
    oracles = [m for m in methods if m["method"] == "oracle" and m["rollout_mse"] is not None]
    tiles = [(str(n), f"problems, {metrics['scored_steps']} scored steps")]
    if best is not None and base:
        tiles += [
            (f"{best['rollout_mse'] / base:.3g}×", f"the deterministic step's error: {name_of(best)}, B = {best['branching_factor']}")
        ]
        tiles += [(f"{best['gain_improved_percent']:.0f} %", f"of the problems improved by {name_of(best)}")]
    if oracles and base:
        top = min(oracles, key=lambda m: m["rollout_mse"])
        tiles += [(f"{top['rollout_mse'] / base:.3g}×", f"with {name_of(top)}, which knows the truth: the ceiling")]
    return tag("ul", [tag("li", tag("b", value), tag("span", what)) for value, what in tiles], class_="tiles")


def method_table(metrics: Mapping[str, Any]) -> Markup:
    """Tabulate errors at the horizons, gains, conservation and cost of every method."""
    methods, horizons = metrics["methods"], metrics["horizons"]
    baseline = baseline_of(methods)
    base = baseline["rollout_mse"]
    heads = ["method", "B", *(f"MSE at {h}" for h in horizons), "rollout MSE", "× deterministic", "gain %", "median %"]
    quantities = quantities_of(methods[0])
    heads += ["improved %", "gain % over det. + proj.", *(["drift"] if quantities else []), "s", "model evals", "reward evals", "peak MB"]
    winner, rows = best_reward(methods), []
    for m in methods:
        lost = f" ({m['blown_up']}/{metrics['problems']} blew up)" if m["blown_up"] else ""
        over = m["gain_over_projected_mean_percent"]
        is_reference = m["method"] == "deterministic" and m["projection"]
        rows.append(
            [
                name_of(m) + lost + (" (recorded)" if m.get("recorded") else ""),
                number(m["branching_factor"]),
                *(_error(m, h) for h in horizons),
                number(m["rollout_mse"], best=m is winner),
                number(m["rollout_mse"] / base if base and m["rollout_mse"] is not None else None, best=m is winner),
                Cell("baseline", 0.0) if m is baseline else gain(m["gain_mean_percent"]),
                Cell(MISSING) if m is baseline else gain(m["gain_median_percent"]),
                Cell(MISSING) if m is baseline else number(m["gain_improved_percent"]),
                Cell("baseline", 0.0) if is_reference else gain(over),
                *([_largest_drift(m, quantities)] if quantities else []),
                number(m["seconds"]),
                number(m["evaluations"]),
                number(m.get("reward_evaluations")),
                number(megabytes(m)),
            ]
        )
    return table(f"Methods on {metrics['problems']} problems ({metrics['error_units']})", heads, rows)


def megabytes(method: Method) -> float | None:
    """Return the most memory held while the method ran, in MB; None where it is not known, as of rows of older runs."""
    peak = method.get("peak_bytes")
    return None if peak is None else round(peak / MEGABYTE, 1)


def _error(method: Method, step: int) -> Cell:
    """Return the error at a step with its 95 % interval, sorted by the error."""
    mean, low, high = (method.get(f"mse_step_{step}{end}") for end in ("", "_low", "_high"))
    return number(mean) if mean is None or low is None or high is None else Cell(f"{short(mean)} [{short(low)}, {short(high)}]", mean)


def quantities_of(method: Method) -> list[str]:
    """Return the conserved quantities whose drift was measured, by the columns of a method; [] where nothing is conserved."""
    return [key.removeprefix("drift_") for key in method if key.startswith("drift_") and key != "drift_by_step"]


def _largest_drift(method: Method, quantities: Sequence[str]) -> Cell:
    return number(max((d for q in quantities if (d := method.get(f"drift_{q}")) is not None), default=None))


def gain(value: float | None) -> Cell:
    """Return the cell of a gain in percent, sorted by the measured value."""
    return Cell(MISSING) if value is None or not math.isfinite(value) else Cell(percent(value), float(value))


def explanation(metrics: Mapping[str, Any]) -> Markup:
    quantities = quantities_of(metrics["methods"][0])
    largest = f"the {'largest ' if len(quantities) > 1 else ''}relative drift of {in_words(quantities)}"
    drift = f"drift: {largest} after the last step. " if quantities else ""
    lines = [
        f"rollout MSE: mean over problems and steps 1 to {metrics['scored_steps']}. gain: SampleGain per problem over the deterministic "
        'rollout, mean and median, "none" where it is not above 0. improved: share of the problems with a smaller error.',
        f"{drift}One model evaluation is one state through the model. Brackets: 95 % interval over problems. The best row "
        "that uses a reward is marked.",
        *([PEAK] if any(m.get("peak_bytes") is not None for m in metrics["methods"]) else []),
        *metrics["notes"],
    ]
    return tag("ul", [tag("li", line) for line in lines], class_="notes")


def guardrail_table(metrics: Mapping[str, Any]) -> Markup:
    columns = ("fallbacks", "resamples", "nonfinite_candidates", "collapsed_steps", "unprojected_steps", "blown_up")
    heads = ["method", *(c.replace("_", " ") for c in columns)]
    rows = [[name_of(m), *(number(m.get(c)) for c in columns)] for m in metrics["methods"]]
    return table("How often the guardrails stepped in, over all problems and steps", heads, rows)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def sweep_section(metrics: Mapping[str, Any]) -> Markup | None:
    """Tabulate the sweep over B; None if the run has none."""
    sweep = metrics.get("sweep")
    if not sweep:
        return None
    rows, n = sweep["rows"], sweep["problems"]
    plain, projected = (_first_problems(metrics["methods"], form, n) for form in (False, True))
    rows = [*rows, *_single_means(metrics, rows, n)]
    note = f"Mean over the first {n} problems, as a ratio to the deterministic rollout of the same problems."
    if projected is not None and not any(r["projection"] for r in rows):
        note += f" The deterministic rollout with projection stands at {short(projected / plain) if plain else MISSING}."
    return joined(
        tag("h3", "Error against the number of candidates"),
        tag("p", note, class_="note"),
        _sweep_table(rows, plain, n),
    )


def _sweep_table(rows: Sequence[Method], plain: float | None, n: int) -> Markup:
    quantities = quantities_of(rows[0]) if rows else []
    heads = [
        "method",
        "B",
        "rollout MSE",
        "× deterministic",
        "gain %",
        "improved %",
        *(["drift"] if quantities else []),
        "s",
        "model evals",
    ]
    body = []
    for r in rows:
        cells = [number(r["branching_factor"]), number(r["rollout_mse"]), number(_ratio(r["rollout_mse"], plain))]
        cells += [gain(r["gain_mean_percent"]), number(r["gain_improved_percent"])]
        cells += [_largest_drift(r, quantities)] if quantities else []
        body.append([name_of(r), *cells, number(r["seconds"]), number(r["evaluations"])])
    return table(f"B sweep on {n} problems", heads, body)


def _first_problems(methods: Sequence[Method], projected: bool, n: int) -> float | None:
    """Return the error of the deterministic rollout on the first ``n`` problems; None if one blew up or there is no such row."""
    found = next((m for m in methods if m["method"] == "deterministic" and bool(m["projection"]) == projected), None)
    errors = [] if found is None else found["per_problem"]["rollout_mse"][:n]
    return sum(errors) / len(errors) if errors and None not in errors else None


def _single_means(metrics: Mapping[str, Any], rows: Sequence[Method], n: int) -> list[dict[str, Any]]:
    """Return the mean of B from the table as a point of the sweep, where it was not swept."""
    points = []
    for form in sorted({bool(r["projection"]) for r in rows}):
        held = next((m for m in metrics["methods"] if m["method"] == "mean" and bool(m["projection"]) == form), None)
        errors = [] if held is None else held["per_problem"]["rollout_mse"][:n]
        if held is None or not errors or None in errors or any(r["method"] == "mean" and bool(r["projection"]) == form for r in rows):
            continue
        gains = held["per_problem"]["gain_percent"][:n]
        known = [g for g in gains if g is not None]
        share = n / metrics["problems"]
        points.append(
            {
                **{key: held[key] for key in ("method", "projection", "branching_factor")},
                "rollout_mse": sum(errors) / len(errors),
                "gain_mean_percent": sum(known) / len(known) if known else None,
                "gain_improved_percent": 100 * sum(g > 0 for g in known) / len(gains),
                "seconds": held["seconds"] * share,
                "evaluations": round(held["evaluations"] * share),
            }
        )
    return points
