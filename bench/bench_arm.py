"""Throughput of ops.arm against the seed's eager functions and the strongest compiled formulation: ``pytest bench --benchmark-only``.

The peers must agree with the float64 reference before they are timed. ``GB/s`` counts each candidate once, the least that must be read.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ttcfast.ops import arm, registry
from ttcfast.spec import ARMWeights, StateSpec

# (N, B, side): one problem of many candidates, and many small problems.
SHAPES = {"N1 B64 64^2": (1, 64, 64), "N1 B8 256^2": (1, 8, 256), "N8 B8 128^2": (8, 8, 128)}
W = ARMWeights()
Peer = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def eager(state: Tensor, cand: Tensor, mask: Tensor, volume: float) -> Tensor:
    """The seed's formulas in its own order, batched over problems: whole integrals, then their difference."""
    total = (cand.sum((-2, -1)) - state.sum((-2, -1)).unsqueeze(1)) * volume  # [N, B, C]
    rho, momentum, energy = cand[:, :, 0], cand[:, :, 1:3], cand[:, :, 3]
    velocity = momentum / (rho + 1e-12).unsqueeze(2)
    pressure = 0.4 * (energy - 0.5 * rho * (velocity * velocity).sum(2))
    boundary = (cand.abs() * mask).sum((-3, -2, -1)) / (mask.sum() * cand.shape[2])
    positivity = rho.clamp_max(0).abs().mean((-2, -1)) + pressure.clamp_max(0).abs().mean((-2, -1))
    kept = W.w_mass * total[..., 0].abs() + W.w_momentum * total[..., 1:3].sum(-1).abs() + W.w_energy * total[..., 3].abs()
    return -(kept + W.w_bc * boundary + W.w_positivity * positivity)


def sliced(state: Tensor, cand: Tensor, mask: Tensor, volume: float) -> Tensor:
    """Every statistic as a reduction over the same [N, B] x cells, per-cell differences: the form that torch.compile fuses best."""
    rho, mx, my, energy = (cand[:, :, c].flatten(2) for c in range(4))
    rho0, mx0, my0, energy0 = (state[:, c].flatten(1).unsqueeze(1) for c in range(4))
    masked = mask.flatten()
    mass = (rho - rho0).sum(-1).abs() * volume
    momentum = ((mx - mx0) + (my - my0)).sum(-1).abs() * volume
    change = (energy - energy0).sum(-1).abs() * volume
    inverse = 1 / (rho + 1e-12)
    pressure = 0.4 * (energy - 0.5 * rho * ((mx * inverse) ** 2 + (my * inverse) ** 2))
    negative = (torch.relu(-rho) + torch.relu(-pressure)).mean(-1)
    boundary = ((rho.abs() + mx.abs() + my.abs() + energy.abs()) * masked).sum(-1) / (4 * masked.sum())
    return -(W.w_mass * mass + W.w_momentum * momentum + W.w_energy * change + W.w_bc * boundary + W.w_positivity * negative)


def ours(backend: str) -> Peer:
    def run(state: Tensor, cand: Tensor, mask: Tensor, volume: float) -> Tensor:
        return arm(state, cand, StateSpec.euler2d(cell_volume=volume, boundary_mask=mask), W, backend=backend).score

    return run


def peers() -> dict[str, Peer]:
    found: dict[str, Peer] = {b.name: ours(b.name) for b in registry.OPS["arm"] if b.available() is None and not registry.interpreting()}
    return {**found, "seed, eager": eager, "sliced, torch.compile": torch.compile(sliced, dynamic=False)}


PEERS = peers()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PEERS)
def test_throughput(benchmark, name: str, shape: str) -> None:
    n, b, side = SHAPES[shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (name == "cpu" and device != "cpu") or (name == "triton" and device == "cpu"):
        pytest.skip(f"{name} does not run on {device}")
    torch.manual_seed(0)
    state = 1 + torch.rand(n, 4, side, side, device=device)
    cand = state.unsqueeze(1) + 0.3 * torch.randn(n, b, 4, side, side, device=device)
    mask = torch.zeros(side, side, dtype=torch.bool, device=device)
    mask[[0, -1]] = True
    run, volume = PEERS[name], 1 / side**2

    def timed() -> Tensor:
        score = run(state, cand, mask, volume)
        if device == "cuda":
            torch.cuda.synchronize()
        return score

    expected = ours("reference")(state.double(), cand.double(), mask, volume)
    torch.testing.assert_close(timed().double(), expected, rtol=1e-4, atol=1e-4)
    benchmark.extra_info |= {"peer": name, "shape": shape, "threads": torch.get_num_threads(), "device": device}
    benchmark.pedantic(timed, rounds=9, warmup_rounds=2)
    benchmark.extra_info["GB/s"] = cand.numel() * cand.element_size() / benchmark.stats.stats.median / 1e9
