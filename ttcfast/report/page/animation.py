"""Animation of fields: one picture holds every frame of every panel, and the script of the page plays it on canvases."""

from __future__ import annotations

import matplotlib
import numpy as np

from ttcfast.report.fields import ShownFields
from ttcfast.report.figures.panels import ERROR_MAP, FIELD_MAP, error_scale

from .html import Markup, short, tag
from .pictures import palette_url

_LEVELS, _NOT_FINITE = 127, 255  # colours of each of the two maps in one palette of 256


def animation(fields: ShownFields, position: int) -> Markup:
    """Return the player of one problem: truth, deterministic rollout, method and both errors, with a button and a slider.

    x points to the right, y upwards; one dimension is drawn as a strip. Colours of fields span the range of the truth; errors reach
    to the 99.5th percentile, as in ``field_panels``. Non-finite cells are grey.
    """
    truth, plain, ours = (_pictures(f[position]) for f in (fields.truth, fields.deterministic, fields.method))
    low, high = float(truth.min()), float(truth.max())
    differences = plain - truth, ours - truth
    largest = error_scale(*map(np.ma.masked_invalid, differences))
    strips = [_indices(f, low, high, 0) for f in (truth, plain, ours)] + [_indices(d, -largest, largest, _LEVELS) for d in differences]
    sheet = np.concatenate([s.reshape(-1, s.shape[-1]) for s in strips], 1)  # columns are panels, frames run downwards
    names = ("truth", "deterministic", fields.name, "deterministic − truth", f"{fields.name} − truth")
    rows, columns = truth.shape[1:]
    problem, last = fields.problems[position], len(fields.steps) - 1
    panels = [
        tag(
            "figure",
            tag("canvas", width=columns, height=rows, role="img", aria_label=f"{fields.quantity}, {name}"),
            tag("figcaption", name),
        )
        for name in names
    ]
    labels = [f"step {s}" + (f", t = {fields.times[i]:.3g}" if fields.times is not None else "") for i, s in enumerate(fields.steps)]
    controls = tag(
        "div",
        tag("button", "Play", type="button"),
        tag("input", type="range", min=0, max=last, value=last, step=1, aria_label=f"frame of problem {problem}"),
        tag("output", labels[-1]),
        class_="controls",
    )
    scales = tag("div", _scale(FIELD_MAP, low, high, fields.quantity), _scale(ERROR_MAP, -largest, largest, "error"), class_="scales")
    caption = f"Problem {problem}: {fields.quantity} of the truth, of the deterministic rollout and of {fields.name}, and both errors"
    return tag(
        "figure",
        tag("figcaption", caption),
        tag("img", src=palette_url(sheet, _palette()), alt=f"{caption}; all frames below each other", class_="sheet"),
        tag("div", panels, class_="panels"),
        controls,
        scales,
        class_="animation",
        data_labels="|".join(labels),
    )


def _pictures(field: np.ndarray) -> np.ndarray:
    """Return ``[F, X, Y]`` or ``[F, X]`` as pictures ``[F, rows from the top, columns]``."""
    frames = field if field.ndim == 3 else np.repeat(field[:, :, None], max(4, field.shape[1] // 8), 2)
    return frames.astype(np.float64).transpose(0, 2, 1)[:, ::-1]


def _indices(values: np.ndarray, low: float, high: float, offset: int) -> np.ndarray:
    share = (values - low) / max(high - low, 1e-30)
    levels = np.clip(np.nan_to_num(share, posinf=1.0, neginf=0.0), 0.0, 1.0) * (_LEVELS - 1) + offset
    return np.where(np.isfinite(values), levels.round(), _NOT_FINITE).astype(np.uint8)


def _palette() -> np.ndarray:
    shares = np.linspace(0, 1, _LEVELS)
    maps = [matplotlib.colormaps[name](shares)[:, :3] * 255 for name in (FIELD_MAP, ERROR_MAP)]
    return np.concatenate([*maps, [[170, 170, 170]] * (256 - 2 * _LEVELS)]).round().astype(np.uint8)


def _scale(name: str, low: float, high: float, what: str) -> Markup:
    colours = (matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)
    strip = tag("img", src=palette_url(np.arange(256, dtype=np.uint8)[None], colours), alt=f"colours of {what}")
    return tag("div", tag("span", short(low)), strip, tag("span", short(high)), tag("span", what, class_="what"), class_="scale")
