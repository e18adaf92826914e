"""Generated data: reproducible in any pieces, conservative, in The Well's layout, resumable, and refused when damaged."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
import yaml

from ttcfast.data import GenerateConfig, TrajectoryFile, find_files, generate, read_trajectories
from ttcfast.data.generate import block_average
from ttcfast.data.pairs import WindowSampler
from ttcfast.runtime.errors import DataError, OutputError

SMALL = {"grid": 8, "frames": 3, "t_end": 0.1, "per_file": 2, "batch": 2, "dtype": "float64"}


def make(out, **changes) -> list:
    return generate(GenerateConfig(out=str(out), **{**SMALL, "n": 6, "split": "train", **changes}))


def test_a_killed_run_goes_on_with_the_same_content(tmp_path, monkeypatch):
    whole = make(tmp_path / "a", presets=("riemann4",))
    assert len(whole) == 3
    pieces = make(tmp_path / "b", presets=("riemann4",))
    pieces[1].unlink()
    before = pieces[0].stat().st_mtime_ns
    again = make(tmp_path / "b", presets=("riemann4",))
    assert again[0].stat().st_mtime_ns == before
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(read_trajectories([a])[0], read_trajectories([b])[0])


def test_a_run_that_dies_while_writing_leaves_no_file(tmp_path, monkeypatch):
    def die(*args, **kwargs):
        raise RuntimeError("killed")

    monkeypatch.setattr("ttcfast.data.well_layout._boundaries", die)
    with pytest.raises(RuntimeError, match="killed"):
        make(tmp_path, presets=("riemann4",))
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []


def test_other_settings_in_the_same_place_are_refused(tmp_path):
    make(tmp_path, n=3)
    with pytest.raises(DataError, match=r"cfl 0.7 instead of 0.3.*another out="):
        make(tmp_path, n=3, cfl=0.3)


def test_splits_share_no_trajectory_and_have_their_sizes(tmp_path):
    config = GenerateConfig(n=1024)
    assert [config.count(s) for s in ("train", "reward", "valid", "test")] == [1024, 128, 64, 64]
    first = [
        read_trajectories([make(tmp_path, split=s, n=3, presets=("riemann4",))[0]])[0][0, 0] for s in ("train", "reward", "valid", "test")
    ]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(first[i], first[j])


def test_presets_share_the_count(tmp_path):
    files = make(tmp_path, n=5, presets=("riemann4", "kelvin_helmholtz"), per_file=8)
    assert {f.name: len(TrajectoryFile(f)) for f in files} == {"riemann4_0000.hdf5": 3, "kelvin_helmholtz_0000.hdf5": 2}


def test_the_stored_states_conserve(tmp_path):
    x, file = read_trajectories(make(tmp_path, n=3))
    drift = (x - x[:, :1]).double().mean((3, 4)).abs().max()
    assert float(drift) < 1e-7 and all(file.spec.periodic_axes)
    assert file.spec.cell_volume == pytest.approx(1 / 64) and file.spec.gamma == pytest.approx(1.4)
    assert file.times.tolist() == pytest.approx([0, 0.05, 0.1])


def test_ranges_reach_the_initial_condition(tmp_path):
    x, _ = read_trajectories(make(tmp_path, n=2, presets=("riemann4",), ranges={"riemann4": {"density": (0.5, 0.55)}}))
    assert float(x[:, 0, 0].min()) >= 0.5 and float(x[:, 0, 0].max()) <= 0.55 + 1e-6


def test_block_average_keeps_the_integral():
    u = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    small = block_average(u, 4)
    assert small.shape == (2, 3, 2, 3) and torch.allclose(small.mean((-1, -2)), u.mean((-1, -2)))
    assert float(small[0, 0, 0, 0]) == pytest.approx(float(u[0, 0, :4, :4].mean()))


def test_the_file_has_the_layout_of_the_well(tmp_path):
    path = make(tmp_path, n=2, presets=("riemann4",))[0]
    with h5py.File(path) as f:
        assert {"dimensions", "boundary_conditions", "scalars", "t0_fields", "t1_fields", "t2_fields"} <= set(f)
        assert f["t0_fields/density"].shape == (2, 3, 8, 8) and f["t1_fields/momentum"].shape == (2, 3, 8, 8, 2)
        assert list(f["t0_fields"].attrs["field_names"]) == ["density", "energy"] and f.attrs["n_spatial_dims"] == 2
        assert {g.attrs["bc_type"] for g in f["boundary_conditions"].values()} == {"PERIODIC"}
        density, momentum = f["t0_fields/density"][1, 2], f["t1_fields/momentum"][1, 2]
    x = TrajectoryFile(path)[1]
    assert np.array_equal(x[2, 0], density) and np.array_equal(x[2, 1:3].permute(1, 2, 0), momentum)


def test_statistics_are_those_of_the_training_split(tmp_path):
    x, _ = read_trajectories(make(tmp_path, n=6))
    stats = yaml.safe_load((tmp_path / "stats.yaml").read_text())
    assert stats["mean"]["density"] == pytest.approx(float(x[:, :, 0].double().mean()), rel=1e-6)
    assert stats["std"]["energy"] == pytest.approx(float(x[:, :, 3].double().std(correction=0)), rel=1e-6)
    delta = x.double().diff(dim=1)
    assert stats["std_delta"]["momentum"][1] == pytest.approx(float(delta[:, :, 2].std(correction=0)), rel=1e-6)


def test_an_unwritable_place_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        make(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"split": "all_of_it"}, "split is 'all_of_it'"),
        ({"presets": ("riemann5",)}, "riemann5"),
        ({"n": 0}, "n is 0"),
        ({"t_end": -1.0}, "t_end is -1.0"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**{"n": 6, **change})


def test_a_missing_truncated_or_foreign_file_gives_one_clear_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        TrajectoryFile(tmp_path / "no.hdf5")
    path = make(tmp_path, n=2, presets=("riemann4",))[0]
    cut = tmp_path / "cut.hdf5"
    cut.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="truncated or no HDF5 file"):
        TrajectoryFile(cut)
    foreign = tmp_path / "foreign.hdf5"
    with h5py.File(foreign, "w") as f:
        f["data"] = np.zeros((1, 2))
        f.create_group("tensors")["u"] = np.zeros(3)
    with pytest.raises(DataError, match=r"t0_fields/density.*found .*tensors/u"):
        TrajectoryFile(foreign)
    with h5py.File(path, "a") as f:
        del f["t0_fields/energy"]
        f["t0_fields/energy"] = np.zeros((2, 3, 8, 9), dtype=np.float32)
    with pytest.raises(DataError, match=r"energy \[2, 3, 8, 8\] .* found t0_fields/energy \[2, 3, 8, 9\]"):
        TrajectoryFile(path)


def test_damaged_layouts_give_one_clear_error(tmp_path):
    path = tmp_path / "odd.hdf5"
    with h5py.File(path, "w") as f:
        f["t0_fields"] = 1.0
    with pytest.raises(DataError, match="damaged or not in The Well's layout"):
        TrajectoryFile(path)
    with h5py.File(path, "w") as f:
        f["t0_fields/density"], f["t0_fields/energy"], f["t1_fields/momentum"], f["dimensions/time"] = 1.0, 1.0, 1.0, 1.0
    with pytest.raises(DataError, match="damaged or not in The Well's layout"):
        TrajectoryFile(path)


def test_what_a_killed_writer_left_is_not_read(tmp_path):
    path = make(tmp_path, n=2, presets=("riemann4",))[0]
    path.with_name(".riemann4_0001.1.partial.hdf5").write_bytes(path.read_bytes()[:100])
    assert find_files(tmp_path, "train") == [path]


def test_files_of_another_physics_are_not_mixed(tmp_path):
    a, b = (make(tmp_path / name, n=2, presets=("riemann4",), gamma=g)[0] for name, g in (("a", 1.4), ("b", 1.6)))
    with pytest.raises(DataError, match=r"gamma 1.6; .* has 1.4"):
        read_trajectories([a, b])
    with pytest.raises(DataError, match="gamma"):
        WindowSampler([a, b])


def test_walls_make_a_closed_domain(tmp_path):
    closed = TrajectoryFile(make(tmp_path / "w", n=2, presets=("riemann4",), boundary="reflecting")[0]).spec
    assert closed.closed and not any(closed.periodic_axes) and closed.conserved_channels == (0, 3)
    opened = TrajectoryFile(make(tmp_path / "o", n=2, presets=("riemann4",), boundary="outflow")[0]).spec
    assert not opened.closed and opened.conserved_channels == ()


def test_reading_is_lazy_and_survives_pickling(tmp_path):
    import pickle

    path = make(tmp_path, n=2, presets=("riemann4",))[0]
    file = TrajectoryFile(path)
    copy = pickle.loads(pickle.dumps(file))
    assert torch.equal(copy.read(1, 1, 3), file[1][1:3])
    with pytest.raises(IndexError, match="trajectory 2 of 2"):
        file[2]


def test_a_few_trajectories_come_from_every_file(tmp_path):
    files = make(tmp_path, n=6, presets=("riemann4", "kelvin_helmholtz"), per_file=8)
    x, _ = read_trajectories(files, 3)
    a, b = (TrajectoryFile(f) for f in files)
    assert torch.equal(x, torch.stack([a[0], b[0], a[1]]))


def test_finding_and_counting_files(tmp_path):
    make(tmp_path, n=4, presets=("riemann4",))
    assert len(find_files(tmp_path, "train")) == 2
    with pytest.raises(DataError, match="ttcfast generate"):
        find_files(tmp_path, "valid")
    with pytest.raises(DataError, match="9 trajectories asked for"):
        read_trajectories(find_files(tmp_path, "train"), 9)
