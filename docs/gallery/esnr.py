"""# Signal to noise of a gradient

The gradient of a linear regression has a mean and a variance that are known exactly. `ESNRMeter` measures their ratio during the
steps of a training run, which it leaves unchanged; here it is put beside the formula.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from ttcfast.esnr.meter import ESNRMeter

torch.manual_seed(0)
D, M, SIZE, NOISE = 20, 64, 8, 1.0
truth = torch.randn(D) / D**0.5


def batch():
    x = torch.randn(M * SIZE, D)
    return x, x @ truth + NOISE * torch.randn(M * SIZE)


def loss_of(x, y):
    return (model(x)[:, 0] - y).square().mean()


# %%
# For standard normal inputs the gradient of one sample has the mean 2 e, where e is the error of the weights, and its covariance has the
# trace 4 ((D + 1) |e|^2 + D s^2), where s is the noise of the targets. A microbatch divides the variance by its size. The raw ratio of M
# microbatches is biased upwards, by about 1 / M; the unbiased one is not.

model = nn.Linear(D, 1, bias=False)
optimizer, meter = torch.optim.SGD(model.parameters(), lr=0.01), ESNRMeter(model, M)
history = []
for _ in range(120):
    error = (model.weight[0] - truth).detach()
    size = error.square().sum()
    exact = 4 * size / (4 * ((D + 1) * size + D * NOISE**2) / SIZE)
    optimizer.zero_grad()
    found = meter.measure(loss_of, *batch()).esnr
    optimizer.step()
    history.append((float(exact), found.raw, found.unbiased))
exact, raw, unbiased = torch.tensor(history).T
for first in (0, 40, 80):
    means = [float(each[first : first + 40].mean()) for each in (exact, unbiased, raw)]
    print("steps {} to {}: exact {:.4f}, unbiased {:.4f}, raw {:.4f}".format(first, first + 39, *means))

# %%

smooth = lambda values: values.unfold(0, 15, 1).mean(1)  # noqa: E731
for name, values in {"exact": exact, "unbiased, mean of 15": unbiased, "raw, mean of 15": raw}.items():
    plt.semilogy(values if name == "exact" else torch.cat([torch.full((7,), torch.nan), smooth(values).clamp_min(1e-4)]), label=name)
plt.xlabel("training step"), plt.ylabel("signal over noise"), plt.legend()

# %%
# With `method="ghost"` one backward of the whole batch gives the same numbers, here with every sample a microbatch:

x, y = batch()
for method, count in (("loop", M * SIZE), ("ghost", None)):
    optimizer.zero_grad()
    print(method, f"{ESNRMeter(model, count, method=method).measure(loss_of, x, y).esnr.raw:.6f}")
