"""# Keyed noise across chunks

Candidates are a function of random seed, step, problem and candidate. Draw them in one batch, in chunks, in another order or on
another process: they are the same. Drawing in sequence, as `model.train()` does, is not.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import ttcfast

torch.manual_seed(0)
spec = ttcfast.StateSpec.fields("u", conserved="all")
first = nn.Conv2d(1, 16, 5, padding=2, padding_mode="circular")
model = nn.Sequential(first, nn.GELU(), nn.Dropout(0.2), nn.Conv2d(16, 1, 5, padding=2, padding_mode="circular"))
surrogate = ttcfast.Surrogate(model, spec, predicts="delta")
x, ids = torch.randn(2, 1, 32, 32), torch.arange(12)

# %%

whole = surrogate.candidates(x, ids, seed=7, step=3)  # [N, B, C, X, Y]
for size in (1, 5, 12):
    parts = torch.cat([surrogate.candidates(x, part, seed=7, step=3) for part in ids.split(size)], 1)
    print(f"chunks of {size:>2}: largest difference {float((parts - whole).abs().max()):.1e}")
order = torch.randperm(12)
print(f"another order: {float((surrogate.candidates(x, order, seed=7, step=3) - whole[:, order]).abs().max()):.1e}")
alone = surrogate.candidates(x[1:], ids, problem_ids=torch.tensor([1]), seed=7, step=3)
print(f"the second problem alone: {float((alone - whole[1:]).abs().max()):.1e}")

# %%
# The same model in training mode under one random seed, in one batch and in chunks:


def sequential(size):
    torch.manual_seed(7)
    model.train()
    with torch.no_grad():
        rows = [x.repeat_interleave(len(part), 0) for part in ids.split(size)]  # problem by problem, as a batch holds them
        drawn = torch.cat([(each + model(each)).unflatten(0, (2, -1)) for each in rows], 1)
    model.eval()
    return drawn


print(f"in sequence, chunks of 5: largest difference {float((sequential(5) - sequential(12)).abs().max()):.2f}")

# %%
# What candidate 9 adds to the deterministic step, drawn in one batch and in chunks of five:

chunked = torch.cat([surrogate.candidates(x, part, seed=7, step=3) for part in ids.split(5)], 1)
still = surrogate.deterministic(x)
shown = {"keyed, one batch": whole[0, 9] - still[0], "keyed, chunks": chunked[0, 9] - still[0]}
shown |= {"in sequence, one batch": sequential(12)[0, 9] - still[0], "in sequence, chunks": sequential(5)[0, 9] - still[0]}
figure, axes = plt.subplots(1, 4, figsize=(11, 3), layout="constrained")
for place, (name, field) in zip(axes, shown.items()):
    place.imshow(field[0], cmap="RdBu_r", vmin=-0.4, vmax=0.4)
    place.set_title(name, fontsize=9), place.set_xticks([]), place.set_yticks([])
