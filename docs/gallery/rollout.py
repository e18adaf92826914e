"""# Improve a rollout

The shipped surrogate rolls out four test problems with shocks; a learned reward moves every step, the conservation laws are
imposed, and the error falls. The classical solver stands beside it.
"""

import matplotlib.pyplot as plt
import torch

import ttcfast
from ttcfast.data import open_trajectories
from ttcfast.metrics import rollout_mse
from ttcfast.models.grid_solvers import solver_of

torch.set_num_threads(1)
model, reward = ttcfast.load("surrogate"), ttcfast.load("prm")
data = open_trajectories("examples/riemann_curved_test.hdf5")
truth = data.stack()[:, :13]  # [N, T+1, C, X, Y]
x0, T = truth[:, 0], 12

# %%
# With one candidate and no move the rollout is the deterministic one. Two full moves along the reward, and projection onto the
# totals, make it the corrected one: one model evaluation a step, too.

plain = ttcfast.improve(model, x0, T, branching_factor=1)
moves = ttcfast.Refine(2, lengths=(1.0,), trust=None)
options = {"reward": reward, "search": "mean", "refine": moves, "project": "conservation"}
corrected = ttcfast.improve(model, x0, T, branching_factor=1, **options)
print(plain, corrected, sep="\n")

# %%
# The same inside each of the eight symmetries of the square, and their mean, for the first two problems:

turned = {"branching_factor": 8, "stochastic": {"dropout": False, "symmetry": True}}
symmetric = ttcfast.improve(model, x0[:2], T, **turned, **options)
solved = solver_of(data, model.spec, work=len(x0) * T).rollout(x0, T, data.shape[0])

found = {"surrogate": plain.trajectory, "corrected": corrected.trajectory, "corrected in 8 symmetries": symmetric.trajectory}
for name, trajectory in {**found, "solver 64x64": solved}.items():
    error = rollout_mse(trajectory[:2], truth[:2], scale=model.normalizer.std)[:, 1:].mean(0)
    plt.semilogy(range(1, T + 1), error, label=name)
plt.xlabel("step"), plt.ylabel("mean squared error, two problems"), plt.legend()

# %%
# Density of the first problem at the last step, and what each rollout misses:

figure, axes = plt.subplots(2, 3, figsize=(9, 5.6), layout="constrained")
last = {"truth": truth, **{name: found[name] for name in ("surrogate", "corrected in 8 symmetries")}}
for (above, below), (name, trajectory) in zip(axes.T, last.items()):
    field = trajectory[0, -1, 0]
    above.imshow(field.T, origin="lower", vmin=truth[0, -1, 0].min(), vmax=truth[0, -1, 0].max())
    below.imshow((field - truth[0, -1, 0]).T, origin="lower", cmap="RdBu_r", vmin=-0.15, vmax=0.15)
    above.set_title(name), below.set_title("minus truth")
    for place in (above, below):
        place.set_xticks([]), place.set_yticks([])
