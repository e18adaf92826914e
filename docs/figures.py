"""Draws the pictures of README and docs that are committed: ``python docs/figures.py rollout``, a minute of one core."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import ttcfast
from ttcfast.data import open_trajectories
from ttcfast.metrics import rollout_mse
from ttcfast.models.grid_solvers import solver_of

ROOT = Path(__file__).resolve().parents[1]
STEPS, SHOWN = 16, 5
COLOURS = {"surrogate": "#000000", "corrected": "#CC79A7", "corrected in 8 symmetries": "#D55E00", "solver 64x64": "#0072B2"}
IMPROVED = "corrected in 8 symmetries"


def rollout(path: Path = ROOT / "docs" / "images" / "rollout.webp") -> None:
    """Draw truth, surrogate and improved rollout of one shipped problem, their errors, and the mean error of all eight over steps."""
    model, reward = ttcfast.load("surrogate"), ttcfast.load("prm")
    data = open_trajectories([ROOT / "examples" / f"{name}_test.hdf5" for name in ("kelvin_helmholtz", "riemann_curved")])
    truth = data.stack()[:, : STEPS + 1]
    start, moves = truth[:, 0], {"search": "mean", "refine": ttcfast.Refine(2, lengths=(1.0,), trust=None)}
    corrected = {"reward": reward, "project": "conservation", **moves}
    turned = {"branching_factor": 8, "stochastic": {"dropout": False, "symmetry": True}}
    found = {
        "surrogate": ttcfast.improve(model, start, STEPS, branching_factor=1).trajectory,
        "corrected": ttcfast.improve(model, start, STEPS, branching_factor=1, **corrected).trajectory,
        IMPROVED: ttcfast.improve(model, start, STEPS, **turned, **corrected).trajectory,
        "solver 64x64": solver_of(data, model.spec, work=len(truth) * STEPS).rollout(start, STEPS, data.shape[0]),
    }
    error = {name: rollout_mse(x, truth, scale=model.normalizer.std) for name, x in found.items()}
    for name, each in error.items():
        print(f"{name}: {float(each[:, -1].mean()):.4f}, of each problem {[round(float(e), 4) for e in each[:, -1]]}")
    fields = {"truth": truth, "surrogate": found["surrogate"], IMPROVED: found[IMPROVED]}
    _draw({name: x[SHOWN, -1, 0] for name, x in fields.items()}, {name: e[:, 1:].mean(0) for name, e in error.items()}, path)


def _draw(fields: dict[str, Tensor], errors: dict[str, Tensor], path: Path) -> None:
    figure = Figure(figsize=(10, 5.4), layout="constrained", facecolor="white")
    axes = figure.subplots(2, 3)
    truth = fields["truth"]
    off = max(float((x - truth).abs().max()) for x in fields.values())
    for place, (name, x) in zip(axes[0], fields.items()):
        image = place.imshow(x.T, origin="lower", cmap="viridis", vmin=float(truth.min()), vmax=float(truth.max()))
        place.set_title(f"{name}, step {STEPS}", fontsize=10)
    figure.colorbar(image, ax=axes[0], shrink=0.9, label="density")
    for place, name in zip(axes[1, 1:], ("surrogate", IMPROVED)):
        image = place.imshow((fields[name] - truth).T, origin="lower", cmap="RdBu_r", vmin=-off, vmax=off)
        place.set_title(f"{name} - truth", fontsize=10)
    figure.colorbar(image, ax=axes[1, 1:], shrink=0.9, label="error")
    for name, each in errors.items():
        axes[1, 0].plot(range(1, len(each) + 1), each, color=COLOURS[name], label=name, linewidth=1.6)
    axes[1, 0].set(xlabel="step", yscale="log", title="mean squared error, 8 problems")
    axes[1, 0].title.set_fontsize(10)
    axes[1, 0].legend(fontsize=8, frameon=False)
    for place in (*axes[0], *axes[1, 1:]):
        place.set_xticks([]), place.set_yticks([])
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    Image.open(drawn).convert("RGB").save(path, quality=82, method=6)


if __name__ == "__main__":
    if sys.argv[1:] != ["rollout"]:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    rollout()
