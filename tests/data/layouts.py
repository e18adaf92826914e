"""Tiny files in the layouts of The Well, PDEGym and PDEBench: h5py alone, after their documentation, never this project's writer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

AXES = ("x", "y", "z")


def flow(n: int, frames: int, shape: Sequence[int], seed: int = 0) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Density, velocities and pressure, each float32 ``[n, frames, *shape]``: waves of random amplitude that move by a cell a frame."""
    rng = np.random.default_rng(seed)
    grids = np.meshgrid(*[(np.arange(m) + 0.5) / m for m in shape], indexing="ij")
    phase = 2 * np.pi * sum(grids)

    def field(mean: float, depth: float) -> np.ndarray:
        amplitude, shift = depth * rng.uniform(0.5, 1, n), rng.uniform(0, 6, n)
        first = np.stack([mean + a * np.sin(phase + s) for a, s in zip(amplitude, shift, strict=True)])
        return np.stack([np.roll(first, t, axis=1) for t in range(frames)], 1).astype(np.float32)

    return field(1.0, 0.3), [field(0.2, 0.2) for _ in shape], field(2.0, 0.4)


def total_energy(rho: np.ndarray, velocity: list[np.ndarray], pressure: np.ndarray, gamma: float) -> np.ndarray:
    kinetic = 0.5 * rho.astype(np.float64) * sum(v.astype(np.float64) ** 2 for v in velocity)
    return (pressure.astype(np.float64) / (gamma - 1) + kinetic).astype(np.float32)


def write_pdegym(
    path: Path, n: int, *, frames: int = 5, grid: int = 8, seed: int = 0, variable: str = "data", axes: Sequence[str] | None = None
) -> np.ndarray:
    """A NetCDF4 file as its library lays it out in HDF5: one variable, and a dimension scale per axis. Returns what it holds."""
    rho, (u, v), pressure = flow(n, frames, (grid, grid), seed)
    fifth = (
        total_energy(rho, [u, v], pressure, 1.4) if variable == "data" else np.linspace(0, 1, rho.size, dtype=np.float32).reshape(rho.shape)
    )
    values = np.stack([rho, u, v, pressure, fifth], 2)
    with h5py.File(path, "w") as file:
        data = file.create_dataset(variable, data=values)
        for position, (name, size) in enumerate(zip(axes or ("sample", "time", "channel", "x", "y"), values.shape, strict=True)):
            scale = file.create_dataset(name, data=np.zeros(size, dtype=">f4"))
            scale.make_scale(f"This is a netCDF dimension but not a netCDF variable.{size:10d}")
            data.dims[position].attach_scale(scale)
    return values


def write_pdebench(
    path: Path, n: int, *, frames: int = 5, shape: Sequence[int] = (8, 8), seed: int = 0, extra_time: bool = True
) -> dict[str, np.ndarray]:
    """A file as Data_Merge.py of PDEBench writes it: fields, coordinates of cell centres, one instant too many, viscosities."""
    rho, velocity, pressure = flow(n, frames, shape, seed)
    held = {"density": rho, "pressure": pressure, **{f"V{axis}": v for axis, v in zip(AXES, velocity, strict=False)}}
    with h5py.File(path, "w") as file:
        for name, values in held.items():
            file.create_dataset(name, data=values)
        for axis, cells in zip(AXES, shape, strict=False):
            file.create_dataset(f"{axis}-coordinate", data=((np.arange(cells) + 0.5) / cells).astype(np.float32))
        file.create_dataset("t-coordinate", data=(0.05 * np.arange(frames + extra_time)).astype(np.float32))
        file.attrs["eta"], file.attrs["zeta"], file.attrs["M"] = 0.01, 0.01, 0.1
    return held


def write_the_well(
    path: Path, n: int, *, frames: int = 5, grid: int = 8, seed: int = 0, gamma: float | Sequence[float] = 1.4, kind: str = "PERIODIC"
) -> dict[str, np.ndarray]:
    """A file of euler_multi_quadrants after the data format page of The Well: pressure among the fields, a gamma per file or trajectory."""
    rho, (u, v), pressure = flow(n, frames, (grid, grid), seed)
    gammas = np.broadcast_to(np.asarray(gamma, dtype=np.float32), (n,))
    energy = np.concatenate([total_energy(rho[i : i + 1], [u[i : i + 1], v[i : i + 1]], pressure[i : i + 1], gammas[i]) for i in range(n)])
    with h5py.File(path, "w") as file:
        file.attrs["dataset_name"], file.attrs["grid_type"] = "euler_multi_quadrants", "cartesian"
        file.attrs["n_spatial_dims"], file.attrs["n_trajectories"] = 2, n
        file.attrs["simulation_parameters"] = ["gamma"]
        dimensions = file.create_group("dimensions")
        dimensions.attrs["spatial_dims"] = ["x", "y"]
        dimensions["time"] = (0.015 * np.arange(frames)).astype(np.float32)
        for axis in "xy":
            dimensions[axis] = ((np.arange(grid) + 0.5) / grid).astype(np.float32)
            side = file.create_group(f"boundary_conditions/{axis.upper()}_boundary")
            side.attrs["associated_dims"], side.attrs["associated_fields"], side.attrs["bc_type"] = [axis], [], kind
            side["mask"] = np.eye(1, grid, dtype=bool)[0] | np.eye(1, grid, grid - 1, dtype=bool)[0]
        scalars = file.create_group("scalars")
        scalars.attrs["field_names"] = ["gamma"]
        scalars["gamma"] = gammas if np.ndim(gamma) else np.float32([gamma])
        scalars["gamma"].attrs["sample_varying"] = bool(np.ndim(gamma))
        for group, names in (("t0_fields", ["density", "energy", "pressure"]), ("t1_fields", ["momentum"]), ("t2_fields", [])):
            file.create_group(group).attrs["field_names"] = names
        file["t0_fields/density"], file["t0_fields/energy"], file["t0_fields/pressure"] = rho, energy, pressure
        file["t1_fields/momentum"] = np.stack([rho * u, rho * v], -1)
    return {"density": rho, "energy": energy, "pressure": pressure, "momentum": np.stack([rho * u, rho * v], 2)}


def write_well_fields(path: Path, n: int = 3, *, frames: int = 5, shape: Sequence[int] = (8, 6), seed: int = 0) -> dict[str, np.ndarray]:
    """A file of other physics after the data format page of The Well: scalars, a vector, a tensor, and fields that do not vary in
    everything. Returns every channel as ``[n, frames, *shape]``."""
    rng, d = np.random.default_rng(seed), len(shape)
    axes = AXES[:d]
    concentration = rng.random((n, frames, *shape)).astype(np.float32)
    velocity = rng.standard_normal((n, frames, *shape, d)).astype(np.float32)
    stress = rng.standard_normal((n, frames, *shape, d, d)).astype(np.float32)
    mask = rng.random((n, *shape)) > 0.5  # not varying in time
    forcing = rng.random((frames, *shape)).astype(np.float32)  # nor between trajectories
    profile = rng.random((1, *shape[1:])).astype(np.float32)  # of the last axes alone
    with h5py.File(path, "w") as file:
        file.attrs["dataset_name"], file.attrs["grid_type"] = "active_matter", "cartesian"
        file.attrs["n_spatial_dims"], file.attrs["n_trajectories"] = d, n
        file.attrs["simulation_parameters"] = ["nu", "L"]
        dimensions = file.create_group("dimensions")
        dimensions.attrs["spatial_dims"] = list(axes)
        dimensions["time"] = (0.25 * np.arange(frames)).astype(np.float32)
        for number, (axis, cells) in enumerate(zip(axes, shape, strict=True)):
            dimensions[axis] = ((np.arange(cells) + 0.5) * 10 / cells).astype(np.float32)
            side = file.create_group(f"boundary_conditions/{axis}_boundary")
            side.attrs["associated_dims"], side.attrs["bc_type"] = [axis], "WALL" if number else "PERIODIC"
            side["mask"] = np.isin(np.arange(cells), (0, cells - 1))
        scalars = file.create_group("scalars")
        scalars["nu"], scalars["L"], scalars["drive"] = np.linspace(0.1, 0.3, n), np.float32(10), np.zeros(frames)
        for name, varies in (("nu", (True, False)), ("L", (False, False)), ("drive", (False, True))):
            scalars[name].attrs["sample_varying"], scalars[name].attrs["time_varying"] = varies
        held = (
            ("t0_fields/concentration", concentration, True, True, [True] * d),
            ("t0_fields/mask", mask, True, False, [True] * d),
            ("t0_fields/forcing", forcing, False, True, [True] * d),
            ("t0_fields/profile", profile, False, False, [False] + [True] * (d - 1)),
            ("t1_fields/velocity", velocity, True, True, [True] * d),
            ("t2_fields/stress", stress, True, True, [True] * d),
        )
        for place, values, sample, time, varies in held:
            file[place] = values
            attributes = {"sample_varying": sample, "time_varying": time, "dim_varying": varies}
            file[place].attrs.update(attributes)
        for rank, names in enumerate((["concentration", "mask", "forcing", "profile"], ["velocity"], ["stress"])):
            file[f"t{rank}_fields"].attrs["field_names"] = names
    whole = {"concentration": concentration, "mask": mask[:, None], "forcing": forcing, "profile": profile}
    whole |= {f"velocity_{a}": velocity[..., i] for i, a in enumerate(axes)}
    whole |= {f"stress_{a}{b}": stress[..., i, j] for i, a in enumerate(axes) for j, b in enumerate(axes)}
    return {name: np.broadcast_to(values, (n, frames, *shape)).astype(np.float32) for name, values in whole.items()}
