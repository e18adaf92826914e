"""# Does a reward rank?

Scores against true errors of the candidates of one step: conservation (ARM), the residual of the Euler equations, and the learned
reward. A perfect scorer has a rank correlation of -1.
"""

import matplotlib.pyplot as plt
import torch

import ttcfast
from ttcfast.data import open_trajectories
from ttcfast.metrics import calibration

torch.set_num_threads(1)
model = ttcfast.load("surrogate")
truth = open_trajectories("examples/riemann_curved_test.hdf5").stack()
noise = {"dropout": False, "symmetry": True}
ids = torch.arange(8)

# %%
# Candidates from true states at four times of four problems, with their errors in units of the training's standard deviations. What
# counts is the order within a group, so that the mean of each group is taken out of scores and errors.

rewards = {
    "ARM": ttcfast.ARMScorer(spec=model.spec),
    "Euler residual": ttcfast.EulerResidualScorer(0.05, 1 / 64, spec=model.spec),
    "learned reward": ttcfast.load("prm"),
}
errors, scores = [], {name: [] for name in rewards}
scale = model.normalizer.std.view(-1, 1, 1)
for step in (0, 5, 10, 15):
    x, y = truth[:, step], truth[:, step + 1]
    candidates = model.candidates(x, ids, seed=0, step=step, stochastic=noise)  # [N, B, C, X, Y]
    errors.append(((candidates - y.unsqueeze(1)) / scale).square().flatten(2).mean(2))
    for name, reward in rewards.items():
        scores[name].append(reward(x, candidates).detach())


def centred(groups):
    each = torch.cat(groups).double()
    return (each - each.mean(1, keepdim=True)) / each.std(1, keepdim=True)


# %%

figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained", sharey=True)
for place, name in zip(axes, rewards):
    found = calibration(centred(scores[name]), centred(errors), bins=6)
    place.plot(centred(scores[name]).flatten(), centred(errors).flatten(), ".", alpha=0.3)
    place.plot(found.score, found.error, "o-")
    place.set_title(f"{name}: {found.rank_correlation:+.2f}"), place.set_xlabel("score within the group")
    print(f"{name}: rank correlation {found.rank_correlation:+.2f}")
axes[0].set_ylabel("error within the group")

# %%
# Among these candidates, the model's steps in eight frames from true states, only the learned reward ranks. Conservation cannot: the
# totals of a step hardly tell how good it is.
