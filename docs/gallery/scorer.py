"""# A scorer of your own

The continuity equation alone, written in a few lines, chooses among candidates along learned directions. Beside it stand a random
choice, the residual of all Euler equations, and the choice by true error, which no user has.
"""

import matplotlib.pyplot as plt
import torch

import ttcfast
from ttcfast.data import open_trajectories
from ttcfast.metrics import rollout_mse
from ttcfast.rewards.common import OracleScorer

torch.set_num_threads(1), torch.manual_seed(0)
model = ttcfast.load("surrogate")
truth = open_trajectories("examples/riemann_curved_test.hdf5").stack()[:, :9]
x0, T, dt, cell = truth[:, 0], 8, 0.05, 1 / 64

# %%
# The density changes by minus the divergence of the momentum: over a step, by the trapezoidal rule and central differences. The
# residual field is a reward by `Residual`; lower is better, so that the score is minus its mean square.


def flux(x):  # momentum along the two axes, [..., C, X, Y] to [..., X, Y]
    u, v = x[..., 1, :, :], x[..., 2, :, :]
    return (u.roll(-1, -2) - u.roll(1, -2) + v.roll(-1, -1) - v.roll(1, -1)) / (2 * cell)


def continuity(x_t, candidates, context):
    before, after = x_t.unsqueeze(1), candidates
    return (after - before)[:, :, 0] + dt / 2 * (flux(before) + flux(after))


# %%
# Candidates are the deterministic step, moved along fields in which the model is known to err; they cost no evaluation of their own.
# The same candidates are given to every choice.

directions = {"dropout": False, "directions": "examples/directions.safetensors"}
options = {"branching_factor": 16, "stochastic": directions, "project": "conservation"}
rewards = {
    "random": lambda x_t, candidates: torch.rand(len(candidates)),
    "continuity": ttcfast.Residual(continuity),
    "Euler equations": ttcfast.EulerResidualScorer(dt, cell, spec=model.spec),
    "true error": OracleScorer(truth, scale=model.normalizer.std),
}
found = {"deterministic": ttcfast.improve(model, x0, T, branching_factor=1, project="conservation")}
found |= {name: ttcfast.improve(model, x0, T, reward=reward, **options) for name, reward in rewards.items()}
for name, result in found.items():
    error = rollout_mse(result.trajectory, truth, scale=model.normalizer.std)[:, 1:].mean(0)
    plt.semilogy(range(1, T + 1), error, label=name)
    print(f"{name:>16}: {error[-1]:.5f} after {T} steps, {result.evaluations} evaluations")
plt.xlabel("step"), plt.ylabel("mean squared error"), plt.legend()

# %%
# In the first steps continuity alone chooses better than chance, and all equations together better still; after eight steps little is left
# of it, even for the choice by true error. [How to choose](../choose.md) says what pays more than choosing one step at a time.
