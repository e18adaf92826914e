"""States, candidates and specs on which the tests of ops.arm run, and the comparison with its float64 reference."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.tolerances import SUMS, assert_within
from ttcfast.ops.arm import ArmScores, arm
from ttcfast.spec import ARMWeights, StateSpec

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
MODES, SCALES = ("sum", "components", "norm"), ("absolute", "relative")
WEIGHTS = ARMWeights(1.0, 0.5, 2.0, 0.3, 0.7)
PENALTIES = ("mass", "momentum", "energy", "boundary", "positivity")


def spec_of(kind: str, ndim: int, components: int, **changes) -> StateSpec:
    """The four kinds of state, with channels in an order that no default would hit."""
    velocity = tuple(range(2, 2 + components))
    last = 2 + components
    layout = {
        "conserved": {"density": 1, "momentum": velocity, "energy": 0},
        "conserved with pressure": {"density": 1, "momentum": velocity, "energy": 0, "pressure": last},
        "primitive": {"density": 0, "momentum": velocity, "energy": None, "pressure": 1, "variables": "primitive"},
        "primitive with energy": {"density": 0, "momentum": velocity, "energy": last, "pressure": 1, "variables": "primitive"},
    }[kind]
    return StateSpec(**{**layout, "ndim": ndim, **changes})


KINDS = ("conserved", "conserved with pressure", "primitive", "primitive with energy")


def problem(spec: StateSpec, space: tuple[int, ...], dtype: torch.dtype, n: int = 2, b: int = 3) -> tuple[Tensor, Tensor]:
    """States of order 1 and candidates near and far from them, some with negative density and pressure."""
    channels = spec.num_channels + 1  # one that nobody reads
    state = (0.5 + torch.rand(n, channels, *space)).to(dtype)
    far = torch.tensor([1e-3, 0.1, 0.8] * b)[:b].reshape(b, 1, *[1] * len(space))
    return state, (state.unsqueeze(1).float() + far * torch.randn(n, b, channels, *space)).to(dtype)


def with_parameters(spec: StateSpec, space: tuple[int, ...], channels: int, n: int) -> StateSpec:
    """The same spec with everything that can be a tensor being one."""
    mask = torch.rand(space) < 0.3
    value = torch.randn(channels, *[1] * len(space))
    return spec.replace(gamma=1.2 + 0.5 * torch.rand(n), cell_volume=0.5 + torch.rand(space), boundary_mask=mask, boundary_value=value)


def reference(state: Tensor, candidates: Tensor, spec: StateSpec, **options) -> ArmScores:
    return arm(state.double(), candidates.double(), spec, WEIGHTS, backend="reference", **options)


def check_against_reference(state, candidates, spec, backend, device, dtype, **options) -> None:
    expected = reference(state, candidates, spec, **options)
    found = arm(state.to(device), candidates.to(device), on(spec, device), WEIGHTS, backend=backend, **options)
    volume = float(torch.as_tensor(spec.cell_volume).expand(state.shape[2:]).sum())
    top = float(candidates.double().abs().amax())
    size = max(1.0, volume) * max(top, 1.0) ** 3  # rho u^2 is the largest thing summed
    assert torch.equal(found.finite.cpu(), expected.finite)
    for name in ArmScores._fields[:6]:
        assert_within(getattr(found, name), getattr(expected, name), SUMS[dtype], size, f"{name} {options}")


def on(spec: StateSpec, device: str) -> StateSpec:
    tensors = {k: getattr(spec, k) for k in ("gamma", "cell_volume", "boundary_mask", "boundary_value")}
    return spec.replace(**{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})
