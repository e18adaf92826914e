"""A Fourier neural operator of neuraloperator for Kolmogorov flow: ``python fno.py DATA OUT`` trains it, ``make`` is its factory."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from neuralop.data.transforms.data_processors import DefaultDataProcessor
from neuralop.data.transforms.normalizers import UnitGaussianNormalizer
from neuralop.models import FNO
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ttcfast import StateSpec, Surrogate, adapters
from ttcfast.data import open_trajectories


def processor() -> DefaultDataProcessor:
    """The model and its normalisers as neuraloperator keeps them; the output is the change over one step."""
    model = FNO(n_modes=(12, 12), in_channels=1, out_channels=1, hidden_channels=24, n_layers=4)
    return DefaultDataProcessor(_one_number(), _one_number()).wrap(model)


def _one_number() -> UnitGaussianNormalizer:
    return UnitGaussianNormalizer(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), dim=[0, 2, 3])


def make(weights: str = "runs/neuraloperator/fno.safetensors") -> Surrogate:
    """The factory of ``ttcfast run_ttc fm.factory=examples.neuraloperator.fno:make``."""
    fno = processor()
    fno.load_state_dict(load_file(weights))
    with safe_open(weights, "pt") as file:
        layout = json.loads(file.metadata()["layout"])
    return Surrogate(
        adapters.neuraloperator(fno),
        StateSpec.from_meta(layout),
        normalizer=adapters.normalizer(fno, predicts="delta"),
        predicts="delta",
        stochastic={"dropout": False, "latent_sigma": 0.05},
    )


def train(data: str, out: str, seconds: float = 120, seed: int = 0) -> Path:
    """Trains for so many seconds and returns the file of the weights."""
    torch.manual_seed(seed)
    trajectories = open_trajectories(data, split="train")
    states = trajectories.stack()  # [N, T+1, 1, H, W]
    x, change = states[:, :-1].flatten(0, 1), states.diff(dim=1).flatten(0, 1)
    fno = processor()
    fno.in_normalizer.fit(x)
    fno.out_normalizer.fit(change)
    optimizer = torch.optim.AdamW(fno.model.parameters(), lr=2e-3)
    began, steps, error = time.monotonic(), 0, float("nan")
    while (spent := (time.monotonic() - began) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (steps + 1) / 50) * (1 - spent)
        rows, shift = torch.randint(len(x), (16,)), int(torch.randint(x.shape[-2], ()))  # the forcing is the same along x
        z, target = (t[rows].roll(shift, -2) for t in (x, change))
        loss = (fno.model(fno.in_normalizer.transform(z)) - fno.out_normalizer.transform(target)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps, error = steps + 1, float(loss.detach())
    path = Path(out) / "fno.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in fno.state_dict().items() if isinstance(value, torch.Tensor)}
    save_file(weights, path, {"layout": json.dumps(trajectories.spec.to_meta())})
    print(f"{steps} steps in {seconds:g} s, last loss {error:.4f}: {path}")
    return path


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python fno.py DATA OUT [SECONDS]")
    train(*sys.argv[1:3], seconds=float(sys.argv[3]) if len(sys.argv) == 4 else 120)
