"""# Forced turbulence

Kolmogorov flow seen on 32x32 cells: the shipped FNO, its corrected mean over symmetries, and the classical solver on the same grid
and the next. The solver on the surrogate's grid is far off; the one on the next is not.
"""

import matplotlib.pyplot as plt
import torch

import ttcfast
from ttcfast.data import open_trajectories
from ttcfast.metrics import rollout_mse
from ttcfast.models.grid_solvers import solver_of

torch.set_num_threads(1)
model, reward = ttcfast.load("examples/kolmogorov/surrogate.safetensors"), ttcfast.load("examples/kolmogorov/prm")
data = open_trajectories("examples/kolmogorov", split=None)
model.spec = data.spec  # the data declare the symmetries of the flow
truth = data.first(8).stack()[:, :13]
x0, T = truth[:, 0], 12

# %%

moves = ttcfast.Refine(1, lengths=(1.0,), trust=None)
turned = {"branching_factor": 4, "stochastic": {"dropout": False, "symmetry": True}}
solver = solver_of(data, model.spec, work=len(x0) * T)
found = {
    "surrogate": ttcfast.improve(model, x0, T, branching_factor=1, stochastic={"dropout": False}).trajectory,
    "corrected mean over symmetries": ttcfast.improve(model, x0, T, reward=reward, search="mean", refine=moves, **turned).trajectory,
    "solver 32x32": solver.rollout(x0, T, 32),
    "solver 64x64": solver.rollout(x0, T, 64),
}
for name, trajectory in found.items():
    error = rollout_mse(trajectory, truth, scale=model.normalizer.std)[:, 1:].mean(0)
    plt.semilogy(range(1, T + 1), error, label=name)
    print(f"{name:>31}: {error[0]:.4f}, {error[3]:.4f}, {error[7]:.3f} after 1, 4 and 8 steps")
plt.xlabel("step"), plt.ylabel("error over variance"), plt.legend()

# %%
# Vorticity of one problem after eight steps:

figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained")
shown = {"truth": truth, **{name: found[name] for name in ("surrogate", "corrected mean over symmetries", "solver 32x32")}}
for place, (name, trajectory) in zip(axes, shown.items()):
    place.imshow(trajectory[3, 8, 0].T, origin="lower", cmap="RdBu_r", vmin=-12, vmax=12)
    place.set_title(name, fontsize=9), place.set_xticks([]), place.set_yticks([])
