"""# A model of neuraloperator

A Fourier neural operator is trained for a few seconds on twelve trajectories of forced turbulence, wrapped in one call, and rolled
out with the mean over the flow's symmetries.
"""

import time

import matplotlib.pyplot as plt
import torch
from neuralop.models import FNO

import ttcfast
from ttcfast import Surrogate, adapters
from ttcfast.core import Normalizer
from ttcfast.data import open_trajectories
from ttcfast.metrics import rollout_mse

torch.set_num_threads(1), torch.manual_seed(0)
data = open_trajectories("examples/kolmogorov", split=None)
states = data.stack()  # [16, 21, 1, 32, 32] vorticity
train, truth = states[:12], states[12:, :9]

# %%
# The network predicts the change over a step, in units of the changes' deviation.

change = train.diff(dim=1)
normalizer = Normalizer(train.mean().reshape(1), train.std().reshape(1), change.std().reshape(1))
fno = FNO(n_modes=(12, 12), in_channels=1, out_channels=1, hidden_channels=20, n_layers=3)
optimizer = torch.optim.AdamW(fno.parameters(), lr=2e-3)
x, target = (train[:, :-1] / train.std()).flatten(0, 1), (change / change.std()).flatten(0, 1)
begun, losses, seconds = time.process_time(), [], 25
while (spent := (time.process_time() - begun) / seconds) < 1:
    optimizer.param_groups[0]["lr"] = 3e-3 * (1 - spent)
    rows, shift = torch.randint(len(x), (8,)), int(torch.randint(32, ()))  # the forcing is the same along x
    loss = (fno(x[rows].roll(shift, -2)) - target[rows].roll(shift, -2)).square().mean()
    optimizer.zero_grad(), loss.backward(), optimizer.step()
    losses.append(float(loss.detach()))
print(f"{len(losses)} steps, loss {sum(losses[:20]) / 20:.3f} at first, {sum(losses[-20:]) / 20:.3f} at last")

# %%
# One call wraps it. The layout of the data declares the symmetries of the flow: half turns, and mirrors with a shift.

surrogate = Surrogate(adapters.neuraloperator(fno), data.spec, normalizer=normalizer, predicts="delta")
x0, T = truth[:, 0], 8
turned = {"branching_factor": 8, "stochastic": {"dropout": False, "symmetry": True}}
found = {
    "deterministic": ttcfast.improve(surrogate, x0, T, branching_factor=1, stochastic={"dropout": False}),
    "mean over symmetries": ttcfast.improve(surrogate, x0, T, search="mean", **turned),
}
still = x0.unsqueeze(1).expand_as(truth)
for name, trajectory in {"persistence": still, **{name: result.trajectory for name, result in found.items()}}.items():
    error = rollout_mse(trajectory, truth, scale=normalizer.std)[:, 1:].mean(0)
    plt.semilogy(range(1, T + 1), error, label=name)
    print(f"{name}: {error[0]:.3f} after one step, {error[-1]:.2f} after {T}")
plt.xlabel("step"), plt.ylabel("error over variance"), plt.legend()
