"""A flow world model's step, K substeps of Heun as in ``FlowWorldModel.next``: forward, and with its gradients.

All peers integrate the same latents over the unit interval with the same velocity, group means subtracted. The gate compares results and
gradients with the plain loop in float64.

* ``eager``: the straightforward loop: concatenation of latent, conditions and time, the MLP in torch modules, two axpys.
* ``torch.compile``: the same loop compiled. Tuned by ``max-autotune-no-cudagraphs`` on CUDA; the graph column is its best number.
* ``torchdiffeq``: ``odeint(method="heun2")`` on the eager velocity, if installed.

``frozen`` computes the gradients of latents and conditions, as an actor's update needs. Its peers are autograd on the eager loop with the
weights' gradients (PWM's own update forms and discards them) and without. ``trained`` computes all gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from ttcfast.integrators import Heun
from ttcfast.ops.mlp_flow import VelocityMLP, mlp_flow

from . import timing
from .groups import backend_of, compiled, tuned
from .targets import Target
from .timing import Case

# name: (latent, conditions, hidden widths, B, K)
CPU_CASES = {
    "small": (64, 22, (128, 128), 256, 4),
    "5M": (512, 70, (512, 512), 256, 4),
}
CUDA_CASES = {
    "5M": (512, 70, (512, 512), 256, 4),
    "48M": (768, 70, (1792, 1792), 1024, 4),
    "width 1024 B256": (512, 128, (1024, 1024, 1024), 256, 8),
    "width 1024 B4096": (512, 128, (1024, 1024, 1024), 4096, 8),
}
MODES = ("forward", "frozen", "trained")
GROUP = 8

# CPU targets from issue 4.
TARGETS = (
    *(Target(f"{name} forward", "eager", "ratio", least=1.2) for name in CPU_CASES),
    *(Target(f"{name} frozen", "eager, with weight gradients", "ratio", least=1.3) for name in CPU_CASES),
    Target("width 1024 B256 forward", "eager", "ratio", least=3.5, device="cuda"),
    Target("width 1024 B256 forward", "torch.compile", "graph_ratio", least=1.2, stretch=2.5, device="cuda"),
    Target("width 1024 B256 forward", "torchdiffeq", "ratio", least=3, device="cuda"),
    Target("width 1024 B4096 forward", "torch.compile", "graph_ratio", least=1.15, device="cuda"),
    Target("width 1024 B256 trained", "eager", "graph_ratio", least=1.25, device="cuda"),
)


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    for name, sizes in (CPU_CASES if device == "cpu" else CUDA_CASES).items():
        latent, conditions, widths, b, k = (16, 3, (8, 8), 4, 2) if tiny else sizes
        for mode in MODES:
            problem = Problem(latent, conditions, widths, b, k, mode, device)
            yield problem.case(
                "mlp_flow",
                f"{name} {mode}",
                f"[{b}, {latent}] + {conditions} -> {'x'.join(map(str, widths))}, K = {k}",
                "float32",
                problem.peers(tiny),
            )


Peer = Callable[["Problem"], Sequence[Tensor]]


class Problem(timing.Problem):
    """Latents on the simplices, conditions, and the parameters of a velocity; created on first use."""

    def __init__(self, latent: int, conditions: int, widths: tuple[int, ...], b: int, k: int, mode: str, device: str) -> None:
        self.latent, self.conditions, self.widths, self.b, self.k, self.mode = latent, conditions, widths, b, k, mode
        self.device = device

    @cached_property
    def z(self) -> Tensor:
        return self.normal(1, self.b, self.latent).unflatten(-1, (-1, GROUP)).softmax(-1).flatten(-2).requires_grad_(self.mode != "forward")

    @cached_property
    def c(self) -> Tensor:
        return self.normal(2, self.b, self.conditions).requires_grad_(self.mode != "forward")

    @cached_property
    def parameters(self) -> list[list[Tensor]]:
        """Return weights, biases, and LayerNorm's weights and biases."""
        sizes = [self.latent + self.conditions + 1, *self.widths, self.latent]
        weights = [self.normal(10 + i, o, n) / n**0.5 for i, (n, o) in enumerate(itertools.pairwise(sizes))]
        biases = [0.1 * self.normal(20 + i, o) for i, o in enumerate(sizes[1:])]
        scales = [1 + 0.1 * self.normal(30 + i, o) for i, o in enumerate(self.widths)]
        shifts = [0.1 * self.normal(40 + i, o) for i, o in enumerate(self.widths)]
        return [weights, biases, scales, shifts]

    def peers(self, tiny: bool) -> dict[str, Peer]:
        """Return the peers, ours first; each returns the result and the requested gradients."""
        fused = compiled(eager, tiny=tiny, **tuned(self.device))
        ours = f"ttcfast, {backend_of('mlp_flow', self.device)}"
        if self.mode == "frozen":
            return {
                ours: lambda p: p.run(our_step, False),
                "eager, with weight gradients": lambda p: p.run(eager, True),
                "eager": lambda p: p.run(eager, False),
                "torch.compile": lambda p: p.run(fused, False),
            }
        trained = self.mode == "trained"
        found = {
            ours: lambda p: p.run(our_step, trained),
            "eager": lambda p: p.run(eager, trained),
            "torch.compile": lambda p: p.run(fused, trained),
        }
        if find_spec("torchdiffeq") is not None and not trained:
            found["torchdiffeq"] = lambda p: p.run(by_torchdiffeq, trained)
        return found

    def run(self, step: Callable[..., Tensor], trained: bool) -> Sequence[Tensor]:
        parameters = self.parameters
        if trained:
            parameters = [[t.detach().requires_grad_() for t in part] for part in parameters]
        if self.mode == "forward":
            with torch.no_grad():
                return [step(self.z, self.c, parameters, self.k)]
        leaves = [self.z, self.c, *(t for part in parameters for t in part if trained)]
        result = step(self.z, self.c, parameters, self.k)
        return [result.detach(), *torch.autograd.grad(result.square().sum(), leaves)]

    def check(self, peers: dict[str, Peer]) -> None:
        z, c = (t.detach().double().requires_grad_() for t in (self.z, self.c))
        parameters = [[t.double().requires_grad_() for t in part] for part in self.parameters]
        result = eager(z, c, parameters, self.k)
        grads = torch.autograd.grad(result.square().sum(), [z, c, *(t for part in parameters for t in part)])
        for name, run in peers.items():
            for found, expected in zip(run(self), [result.detach(), *grads]):
                error = (found.double() - expected).norm() / expected.norm()
                assert float(error) < 1e-4, f"{name}: relative error {float(error):.1e} in the tensor of shape {tuple(found.shape)}"

    def normal(self, seed: int, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator(seed))


def velocity(z: Tensor, c: Tensor, parameters: list[list[Tensor]], tau: Tensor) -> Tensor:
    weights, biases, scales, shifts = parameters
    x = torch.cat([z, c, tau], -1)
    for w, b, scale, shift in zip(weights, biases, scales, shifts):
        x = F.mish(F.layer_norm(F.linear(x, w, b), scale.shape, scale, shift))
    x = F.linear(x, weights[-1], biases[-1]).unflatten(-1, (-1, GROUP))
    return (x - x.mean(-1, keepdim=True)).flatten(-2)


def eager(z: Tensor, c: Tensor, parameters: list[list[Tensor]], count: int) -> Tensor:
    dt = 1 / count
    for k in range(count):
        k1 = velocity(z, c, parameters, torch.full_like(z[:, :1], k * dt))
        k2 = velocity(z + dt * k1, c, parameters, torch.full_like(z[:, :1], (k + 1) * dt))
        z = z + (0.5 * dt) * (k1 + k2)
    return z


def by_torchdiffeq(z: Tensor, c: Tensor, parameters: list[list[Tensor]], count: int) -> Tensor:
    from torchdiffeq import odeint

    times = torch.arange(count + 1, device=z.device, dtype=z.dtype) / count
    return odeint(lambda t, y: velocity(y, c, parameters, t.expand(len(y), 1)), z, times, method="heun2")[-1]


def our_step(z: Tensor, c: Tensor, parameters: list[list[Tensor]], count: int) -> Tensor:
    """Mirror FlowWorldModel.next: the first product in three parts, then the fused loop."""
    (first, *others), (bias, *biases), scales, shifts = parameters
    weight_z, weight_c, weight_tau = first.split([z.shape[1], c.shape[1], 1], dim=1)
    rows = F.linear(c, weight_c, bias)
    times = (torch.arange(count + 1, device=z.device, dtype=z.dtype) / count).unsqueeze(1) * weight_tau.t()
    integrator = Heun(count)
    network = VelocityMLP([weight_z, *others], biases, scales, shifts)
    return mlp_flow(z, rows, times, network, method=integrator.name, substeps=integrator.substeps, group=GROUP)
