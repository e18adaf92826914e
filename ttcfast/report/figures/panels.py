"""Fields of the truth, the deterministic rollout and a method at several times, with both errors."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ttcfast.evaluation.evaluate import Evaluation
from ttcfast.evaluation.results import MethodResult

from .style import colour, finish, new_figure

Masked = np.ma.MaskedArray

FIELD_MAP, ERROR_MAP = "viridis", "RdBu_r"  # both keep their order in grey and for every colour vision


def field_panels(
    evaluation: Evaluation,
    result: MethodResult,
    *,
    position: int = 0,
    channel: int = 0,
    quantity: str = "density",
    steps: Sequence[int] | None = None,
    times: Tensor | None = None,
    extent: tuple[float, ...] | None = None,
) -> Figure:
    """Draw truth, deterministic rollout, ``result`` and both errors as rows, with steps as columns.

    Fields share one colour scale, errors another. x, the first space axis, points to the right, y upwards; three dimensions show the slice
    through the middle of z, one dimension shows curves.

    Args:
        evaluation: Evaluation with the deterministic trajectory and the truth.
        result: Method to compare, with its trajectory.
        position: Index into the kept trajectories.
        channel: Channel to show.
        quantity: Name of the channel, with its unit if it has one.
        steps: Steps to show; None takes four spread over the steps with a known truth.
        times: ``[K+1]``, times of the steps, for the titles; None omits them.
        extent: Lengths of the domain in x, and where there is one in y; None means equal cells and a length of 1 in x.

    Raises:
        ValueError: A result has no trajectory.
    """
    if result.trajectory is None or evaluation.baseline.trajectory is None:
        raise ValueError(f"{result.name} has no trajectory; evaluate with Problems(shown=...) naming the problem to draw")
    steps = list(steps) if steps is not None else _spread(evaluation.scored)
    truth = _slice(evaluation.truth[position, steps, channel])
    baseline, ours = (_slice(r.trajectory[position, steps, channel]) for r in (evaluation.baseline, result) if r.trajectory is not None)
    titles = [f"step {s}" + (f"\nt = {float(times[s]):.2f}" if times is not None and s < len(times) else "") for s in steps]
    problem = evaluation.shown[position]
    extent = tuple(n / truth.shape[1] for n in truth.shape[1:]) if extent is None else extent
    if truth.ndim == 2:
        return _curves(truth, baseline, ours, result, titles, quantity, problem, extent)
    return _images(truth, baseline, ours, result, titles, quantity, problem, extent)


def _spread(last: int) -> list[int]:
    return sorted({max(1, round(last * share)) for share in (0.05, 0.25, 0.5, 1.0)})


def _slice(fields: Tensor) -> Masked:
    """Return ``[steps, *S]`` as ``[steps, X]`` or ``[steps, X, Y]`` with non-finite cells masked."""
    fields = fields[..., fields.shape[-1] // 2] if fields.ndim == 4 else fields
    return np.ma.masked_invalid(fields.double().numpy())


def _images(
    truth: Masked,
    baseline: Masked,
    ours: Masked,
    result: MethodResult,
    titles: list[str],
    quantity: str,
    problem: int,
    extent: tuple[float, ...],
) -> Figure:
    name = textwrap.fill(result.name, 24)  # as long as a row is high
    rows = [
        ("truth", truth, False),
        ("deterministic", baseline, False),
        (name, ours, False),
        ("deterministic\n− truth", baseline - truth, True),
        (f"{name}\n− truth", ours - truth, True),
    ]
    sides, tall = (0.0, extent[0], 0.0, extent[1]), min(max(extent[1] / extent[0], 0.3), 1.5)
    figure = new_figure(2.0 + 2.1 * len(titles), 1.0 + 2.0 * len(rows) * tall, f"{quantity}, problem {problem}")
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    low, high = float(truth.min()), float(truth.max())  # of the truth alone: a rollout that ran away must not flatten the others
    largest = error_scale(baseline - truth, ours - truth)
    for (label, fields, is_error), line in zip(rows, grid, strict=True):
        for axes, field in zip(line, fields, strict=True):
            limits: dict[str, Any] = (
                {"vmin": -largest, "vmax": largest, "cmap": ERROR_MAP} if is_error else {"vmin": low, "vmax": high, "cmap": FIELD_MAP}
            )
            # arrays are [x, y]; a picture is [rows from below, columns]
            picture = axes.imshow(field.T, origin="lower", extent=sides, interpolation="nearest", **limits)
            axes.set_facecolor("#BBBBBB")
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])
            if field.mask.any():
                axes.text(0.5, 0.5, "not finite", transform=axes.transAxes, ha="center", va="center", fontsize=8)
        line[0].set_ylabel(label, fontsize=9)
        if label in ("deterministic", "deterministic\n− truth"):
            band = grid[3:] if is_error else grid[:3]
            bar = figure.colorbar(picture, ax=band, shrink=0.75, aspect=30, extend="both", pad=0.02)
            bar.set_label(f"{quantity}: prediction − truth" if is_error else quantity, fontsize=9)
            bar.ax.tick_params(labelsize=8)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    _corner(grid[-1][0], sides[1], sides[3])
    figure.align_ylabels(grid[:, 0])
    return figure


def _corner(axes: Axes, width: float, height: float) -> None:
    """Label the axes of the lower left panel, on behalf of all panels."""
    axes.set_xticks([0, width])
    axes.set_yticks([0, height])
    axes.tick_params(labelsize=7)
    axes.set_xlabel("x", fontsize=8, labelpad=-4)
    axes.annotate("y", (0, 0.5), xytext=(-7, 0), xycoords="axes fraction", textcoords="offset points", fontsize=8, ha="center", va="center")


def error_scale(*errors: Masked) -> float:
    """Return the 99.5th percentile of the unmasked magnitudes, so that a few cells at a shock do not set the scale."""
    values = np.concatenate([np.abs(e.compressed()) for e in errors])
    return max(float(np.percentile(values, 99.5)) if values.size else 1.0, 1e-12)


def _curves(
    truth: Masked,
    baseline: Masked,
    ours: Masked,
    result: MethodResult,
    titles: list[str],
    quantity: str,
    problem: int,
    extent: tuple[float, ...],
) -> Figure:
    figure = new_figure(1.5 + 2.6 * len(titles), 5.0, f"{quantity}, problem {problem}")
    fields, errors = figure.subplots(2, len(titles), squeeze=False, sharex=True, sharey="row")
    x = (np.arange(truth.shape[1]) + 0.5) * extent[0] / truth.shape[1]
    for column, title in enumerate(titles):
        fields[column].plot(x, truth[column], color="#9A9A9A", linewidth=3, label="truth")
        for name, values, method in (("deterministic", baseline, "deterministic"), (result.name, ours, result.method)):
            fields[column].plot(x, values[column], color=colour(method), linewidth=1.3, label=name)
            errors[column].plot(x, values[column] - truth[column], color=colour(method), linewidth=1.3)
        fields[column].set_title(title, fontsize=9)
        finish(fields[column], None, quantity if column == 0 else None)
        finish(errors[column], "x", "prediction − truth" if column == 0 else None)
    handles, labels = fields[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return figure
