"""# Improve the rollout of a neuraloperator model

In an environment with `pip install '.[adapters]'`, run `python neuraloperator_rollout.py` in an empty folder: it makes data, trains a
Fourier neural operator as a user of neuraloperator would, and evaluates its rollout with and without test-time compute. With a model and
data of your own, only the last two parts remain.
"""

import subprocess
import sys

import torch
from neuralop.models import FNO

import ttcfast
from ttcfast import Surrogate, adapters
from ttcfast.core import Normalizer
from ttcfast.data import open_trajectories

# %%
# The data: forced turbulence, sixteen trajectories to train on and four to test, as
# `ttcfast generate system=kolmogorov split=train n=16 out=flow` makes them in a terminal.

generate = [sys.executable, "-m", "ttcfast.cli.generate", "system=kolmogorov", "out=flow"]
subprocess.run([*generate, "split=train", "n=16"], check=True)
subprocess.run([*generate, "split=test", "n=4"], check=True)

# %%
# The model, trained on the change over one step and saved as neuraloperator saves it.

torch.manual_seed(0)
data = open_trajectories("flow", split="train")
states = data.stack()  # [N, T+1, 1, H, W] vorticity
change = states.diff(dim=1)
fno = FNO(n_modes=(12, 12), in_channels=1, out_channels=1, hidden_channels=16, n_layers=3)
x, target = (states[:, :-1] / states.std()).flatten(0, 1), (change / change.std()).flatten(0, 1)
steps = 250
optimizer = torch.optim.AdamW(fno.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for _ in range(steps):
    rows, shift = torch.randint(len(x), (8,)), int(torch.randint(x.shape[-2], ()))  # the forcing is the same along x
    loss = (fno(x[rows].roll(shift, -2)) - target[rows].roll(shift, -2)).square().mean()
    optimizer.zero_grad(), loss.backward(), optimizer.step(), scheduler.step()
fno.save_checkpoint("checkpoint", "fno")

# %%
# Wrapped in one call: what the channels are (the data's own declaration), how the model's numbers become physical ones, and what it
# predicts. [Wrap your model](../models.md) has the rest.

fno = FNO.from_checkpoint("checkpoint", "fno")
normalizer = Normalizer(states.mean().reshape(1), states.std().reshape(1), change.std().reshape(1))
surrogate = Surrogate(adapters.neuraloperator(fno), data.spec, normalizer=normalizer, predicts="delta")

# %%
# Eight candidates a step, each computed in another symmetry of the flow, and their mean (`mean`), beside the deterministic step, a random
# candidate, and the choice by conservation (`arm`) and by an oracle.

turned = {"branching_factor": 8, "stochastic": {"dropout": False, "symmetry": True}}
found = ttcfast.evaluate(surrogate, "flow", split="test", steps=8, **turned)
print(found.table())

# %%
# The rollout itself, from any state:

x0 = open_trajectories("flow", split="test").stack()[:, 0]  # [N, 1, H, W]
result = ttcfast.improve(surrogate, x0, T=8, search="mean", **turned)
torch.save(result.trajectory, "improved.pt")  # [N, 9, 1, H, W]
