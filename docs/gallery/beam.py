"""# Beam against greedy

Does it pay to keep several paths? Error over model evaluations, for greedy searches of growing B and for beams of the same cost,
on forced turbulence with its learned reward as the choice.
"""

import matplotlib.pyplot as plt
import torch

import ttcfast
from ttcfast.data import open_trajectories
from ttcfast.metrics import rollout_mse

torch.set_num_threads(1)
model, reward = ttcfast.load("examples/kolmogorov/surrogate.safetensors"), ttcfast.load("examples/kolmogorov/prm")
data = open_trajectories("examples/kolmogorov", split=None)
model.spec = data.spec  # the data declare the symmetries of the flow
truth = data.first(6).stack()[:, :7]
x0, T = truth[:, 0], 6
noise = {"dropout": False, "symmetry": True}

# %%
# A beam search of width k draws B candidates from each beam and keeps the best k paths, so that it costs k B evaluations a step.


def outcome(branching, width):
    search = ttcfast.Beam(width=width) if width > 1 else "greedy"
    result = ttcfast.improve(model, x0, T, reward=reward, branching_factor=branching, search=search, stochastic=noise)
    each = rollout_mse(result.trajectory, truth, scale=model.normalizer.std)[:, -1]
    return result.evaluations / len(x0) / T, each


plain = outcome(1, 1)[1]
for label, settings in {"greedy": [(2, 1), (3, 1), (4, 1)], "beam of 2": [(2, 2), (4, 2)], "beam of 4": [(4, 4)]}.items():
    points = [outcome(*each) for each in settings]
    plt.plot([cost for cost, _ in points], [float(each.mean() / plain.mean()) for _, each in points], "o-", label=label)
    for (branching, _), (cost, each) in zip(settings, points):
        error = float(each.mean() / plain.mean())
        print(f"{label}, B = {branching}: {cost:5.1f} evaluations a step, error {error:.3f} of the deterministic")
mean = ttcfast.improve(model, x0, T, branching_factor=4, search="mean", stochastic=noise)
ratio = float(rollout_mse(mean.trajectory, truth, scale=model.normalizer.std)[:, -1].mean() / plain.mean())
print(f"mean of 4, no choice: {mean.evaluations / len(x0) / T:5.1f} evaluations a step, error {ratio:.3f} of the deterministic")
plt.plot([mean.evaluations / len(x0) / T], [ratio], "s", label="mean of 4, no choice")
plt.xscale("log", base=2), plt.xlabel("model evaluations per step and problem"), plt.ylabel("error over deterministic"), plt.legend()

# %%
# Here it does not pay: beams cost more and are no better than a greedy choice, and the mean without any choice is below both. Six
# problems say little about small differences; `eval.frontier` of `ttcfast run_ttc` draws this figure for all searches on your data.
