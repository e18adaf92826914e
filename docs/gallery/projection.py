"""# Conservation by projection

A surrogate loses mass, momentum and energy a little at every step. Projection takes each conserved channel's mean residual out of the
new state: exact, free, and it lowers the error.
"""

import matplotlib.pyplot as plt
import torch

import ttcfast
from ttcfast.data import open_trajectories
from ttcfast.metrics import conservation_drift, rollout_mse

torch.set_num_threads(1)
model = ttcfast.load("surrogate")
truth = open_trajectories("examples/riemann_curved_test.hdf5").stack()
x0, T = truth[:, 0], 20
raw = ttcfast.improve(model, x0, T, branching_factor=1).trajectory
held = ttcfast.improve(model, x0, T, branching_factor=1, project="conservation").trajectory

# %%
# The relative change of the totals since the first frame, mean of four problems:

figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained", sharey=True)
drifts = {name: conservation_drift(x, model.spec) for name, x in {"truth": truth, "raw": raw, "projected": held}.items()}
for place, quantity in zip(axes, ("mass", "momentum", "energy")):
    for name, drift in drifts.items():
        place.semilogy(drift[quantity].mean(0).clamp_min(1e-12)[1:], label=name)
    place.set_title(quantity), place.set_xlabel("step")
axes[0].legend(), axes[0].set_ylabel("relative drift")

# %%

for name, x in {"raw": raw, "projected": held}.items():
    error = rollout_mse(x, truth, scale=model.normalizer.std)[:, -1].mean()
    print(f"{name}: error {error:.4f} after {T} steps, drift of mass {float(drifts[name]['mass'][:, -1].max()):.1e}")

# %%
# `project="declared"` of a layout of your own also holds bounds and removes divergence. Here a field of random velocity and a depth
# that must not be negative, after one step of a model that knows nothing of either:

spec = ttcfast.StateSpec.fields("h", "u", "v", conserved="h", bounds={"h": (0, None)}, divergence_free=("u", "v"))
noisy = ttcfast.Surrogate(torch.nn.Conv2d(3, 3, 1), spec)
x = torch.rand(1, 3, 32, 32)
step = {name: ttcfast.improve(noisy, x, 1, branching_factor=1, project=name).trajectory[0, -1] for name in (None, "declared")}
for name, y in step.items():
    u, v = torch.fft.fft2(y[1]), torch.fft.fft2(y[2])
    k = torch.fft.fftfreq(32, 1 / 32)
    divergence = torch.fft.ifft2(1j * (k[:, None] * u + k[None, :] * v)).real.abs().max()
    print(f"project={name!r}: smallest depth {float(y[0].min()):+.3f}, change of its mean {float((y[0] - x[0, 0]).mean()):+.1e}, ", end="")
    print(f"largest divergence {float(divergence):.1e}")
