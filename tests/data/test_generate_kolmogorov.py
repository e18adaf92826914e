"""``ttcfast generate system=kolmogorov``: what the solver computes, seen on a coarser grid, declared and resumable."""

import pytest
import torch

from ttcfast.data import open_trajectories
from ttcfast.data.generate import GenerateConfig, KolmogorovFlow, generate
from ttcfast.physics.navier_stokes import LENGTH, VorticitySolver, random_vorticity, spectral_resampling
from ttcfast.runtime.errors import ArgumentError, DataError
from ttcfast.states.symmetry import group_of

FLOW = KolmogorovFlow(viscosity=0.01, spin_up=0.5)
SMALL = {"system": "kolmogorov", "grid": 16, "factor": 2, "frames": 3, "t_end": 0.5, "per_file": 2, "batch": 2, "kolmogorov": FLOW}


def make(out, **changes):
    return generate(GenerateConfig(out=str(out), **{**SMALL, "n": 3, "split": "train", **changes}))


def test_files_hold_the_solution_seen_on_the_coarse_grid(tmp_path):
    files = make(tmp_path)
    assert [path.name for path in files] == ["kolmogorov_0000.hdf5", "kolmogorov_0001.hdf5"]
    found = open_trajectories(tmp_path, split="train")
    solved = VorticitySolver(viscosity=0.01, cfl=0.8).rollout(random_vorticity(3, 32, seed=0), [0.5, 0.75, 1.0])
    torch.testing.assert_close(found.stack(), spectral_resampling(solved, 16), atol=1e-5, rtol=1e-5)
    assert found.times.tolist() == [0.0, 0.25, 0.5]
    assert found.spec.names == ("vorticity",) and found.spec.conserved_groups == {"vorticity": (0,)}
    assert found.spec.cell_volume == pytest.approx((LENGTH / 16) ** 2) and found.spec.periodic_axes == (True, True)
    group = group_of(found.spec, (16, 16))
    assert len(group) == 16 and found.spec.translations == (0,)  # half turns, and mirrors with a shift by an eighth of the sides
    solver = VorticitySolver(viscosity=0.01, dtype=torch.float64)
    state = found.stack()[:1, 0].double()
    after = solver.rollout(state, [0.25])[:, 0]
    for g in group:
        torch.testing.assert_close(g.undo(solver.rollout(g.apply(state, found.spec), [0.25])[:, 0], found.spec), after, atol=1e-9, rtol=0)
    assert (tmp_path / "stats.yaml").read_text().count("vorticity") == 6


def test_an_interrupted_run_resumes_with_the_same_bits_and_other_settings_are_refused(tmp_path):
    files = make(tmp_path)
    before = open_trajectories(tmp_path, split="train").stack()
    files[1].unlink()
    make(tmp_path)
    assert torch.equal(open_trajectories(tmp_path, split="train").stack(), before)
    with pytest.raises(DataError, match=r"kolmogorov .*'viscosity': 0.01.* instead of .*'viscosity': 0.02"):
        make(tmp_path, kolmogorov=KolmogorovFlow(viscosity=0.02, spin_up=0.5))


def test_the_system_fills_in_what_is_left_open():
    euler, flow = GenerateConfig(), GenerateConfig(system="kolmogorov")
    assert (euler.out, euler.grid, euler.factor, euler.t_end, euler.cfl, euler.count("train")) == ("data/euler64", 64, 2, 1.0, 0.7, 1008)
    assert (flow.out, flow.grid, flow.factor, flow.t_end, flow.cfl, flow.count("train")) == ("data/kolmogorov32", 32, 4, 5.0, 0.8, 1000)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"system": "burgers"}, "system is 'burgers'; it must be one of 'euler', 'kolmogorov'"),
        ({"grid": 15}, "grid is 15; a spectral solver takes an even number"),
        ({"t_end": 0.0}, "t_end is 0.0; give a positive end time"),
    ],
)
def test_wrong_settings_are_one_clear_error(tmp_path, changes, message):
    with pytest.raises((ValueError, ArgumentError), match=message):
        make(tmp_path, **changes)
    with pytest.raises(ValueError, match="spin_up is -1"):
        KolmogorovFlow(spin_up=-1)
