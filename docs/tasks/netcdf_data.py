"""# Bring a NetCDF data set of another physics

With `pip install . xarray h5netcdf`, run `python netcdf_data.py` in an empty folder. The physics is shallow water: a solver writes a NetCDF
file as a stand-in for yours, which is then read, declared, converted, trained on and evaluated. With a file of your own, begin at the
second part.
"""

import subprocess
import sys

import numpy as np
import torch
import xarray

import ttcfast
from ttcfast.data import write_well

# %%
# Twelve runs of shallow water on a periodic square of 32 x 32 cells, by Rusanov's scheme, in `water.nc`.


def flux(q, axis):  # [N, 3, X, Y] in the direction of an axis, and the speed of the fastest wave; gravity is 1
    h, u = q[:, :1], q[:, 1:] / q[:, :1]
    across = u[:, axis : axis + 1]
    f = q * across
    f[:, 1 + axis] += 0.5 * h[:, 0] ** 2
    return f, np.abs(across) + np.sqrt(h)


def advance(q, dt, dx=1 / 32):
    change = np.zeros_like(q)
    for axis in (0, 1):
        f, speed = flux(q, axis)
        q2, f2, speed2 = (np.roll(a, -1, 2 + axis) for a in (q, f, speed))
        face = 0.5 * (f + f2) - 0.5 * np.maximum(speed, speed2) * (q2 - q)
        change -= (face - np.roll(face, 1, 2 + axis)) / dx
    return q + dt * change


rng = np.random.default_rng(0)
centre = (np.arange(32) + 0.5) / 32
q = np.zeros((12, 3, 32, 32))
for i in range(12):  # a drop somewhere on still water
    x, y = (np.abs((centre - rng.random() + 0.5) % 1 - 0.5) for _ in range(2))
    q[i, 0] = 1 + rng.uniform(0.2, 0.5) * np.exp(-(x[:, None] ** 2 + y**2) / 0.02)
frames = [q]
for _ in range(12):
    for _ in range(10):
        q = advance(q, dt=0.004)
    frames.append(q)
each = np.stack(frames, axis=1).astype("float32")  # [run, time, variable, x, y]
dims = ("run", "time", "x", "y")
water = {name: (dims, each[:, :, i]) for i, name in enumerate(("h", "hu", "hv"))}
axes = {"time": 0.04 * np.arange(13), "x": centre, "y": centre}
xarray.Dataset(water, coords=axes, attrs={"gravity": 1.0}).to_netcdf("water.nc", engine="h5netcdf")

# %%
# From NetCDF to a tensor `[N, T+1, C, X, Y]`: one variable after the other along the axis of the channels. (The package netCDF4 reads the
# same as `netCDF4.Dataset("water.nc")["h"][:]`.) Every frame of a trajectory must be one time step after the last.

file = xarray.open_dataset("water.nc", engine="h5netcdf")
names = ("h", "hu", "hv")
states = torch.stack([torch.from_numpy(file[name].transpose("run", "time", "x", "y").values) for name in names], dim=2)
times = file["time"].values

# %%
# The physics, [declared](../physics.md) by the names of the channels: mass and momentum are conserved, the depth stays positive, and the
# domain is periodic, which is the default. The equations are the same after an exchange of the axes and in a mirror: all eight turns and
# mirrors of the square follow from these two.

cell = float(file["x"][1] - file["x"][0]) * float(file["y"][1] - file["y"][0])
totals = {"mass": "h", "momentum": ("hu", "hv")}
same = [{"order": (1, 0)}, {"flips": (True, False)}]
spec = ttcfast.StateSpec.fields(*names, conserved=totals, bounds={"h": (0, None)}, symmetries=same, cell_volume=cell)

# %%
# Written once in The Well's layout, the data carry that declaration, and all commands read them: seven runs to train on, one
# to watch the training by, four to test.

for split, runs in (("train", states[:7]), ("valid", states[7:8]), ("test", states[8:])):
    write_well(f"water/data/{split}/water.hdf5", runs, times, spec, dataset_name="water")

# %%
# A surrogate, as `ttcfast train_fm data=water architecture=fno ...` trains it in a terminal, and the table of every method on the test
# runs, whose eight candidates a step are computed in the eight frames. A model of your own is not trained here but [wrapped](../models.md).

small = ["fno.width=12", "fno.modes=8", "fno.depth=3", "fno.dropout=0.05", "steps=200", "batch=8", "valid=1", "warmup=10", "lr=0.003"]
train = [sys.executable, "-m", "ttcfast.cli.train_fm", "data=water", "architecture=fno", "out=fm", *small]
subprocess.run(train, check=True)
surrogate = ttcfast.load("fm/surrogate.safetensors")
turned = {"branching_factor": 8, "stochastic": {"dropout": False, "symmetry": True}}
found = ttcfast.evaluate(surrogate, "water", split="test", steps=8, methods=["deterministic", "mean", "oracle"], **turned)
print(found.table())

# %%
# The mean over the frames as a rollout that holds mass, momentum and the bound on the depth, and how far from it the total mass is:

result = ttcfast.improve(surrogate, states[8:, 0], T=8, search="mean", project="declared", **turned)
drift = ttcfast.metrics.conservation_drift(result.trajectory, spec)["mass"].max()
print(f"drift of mass {drift:.1e}, smallest depth {result.trajectory[:, :, 0].min():.2f}")
torch.save(result.trajectory, "improved.pt")  # [4, 9, 3, 32, 32]
