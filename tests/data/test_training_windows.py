"""What the trainer reads: every window once an epoch, the same after a resume, and symmetries that keep the physics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttcfast.data import GenerateConfig, generate
from ttcfast.data.pairs import WindowSampler
from ttcfast.data.symmetry import random_declared, random_symmetry
from ttcfast.physics import EulerSolver
from ttcfast.physics.initial_conditions import riemann4
from ttcfast.physics.navier_stokes import VorticitySolver, random_vorticity
from ttcfast.spec import StateSpec
from ttcfast.states import Symmetry


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    out = tmp_path_factory.mktemp("windows")
    return generate(
        GenerateConfig(
            out=str(out), split="train", n=4, presets=("riemann4",), grid=8, frames=4, t_end=0.1, per_file=3, batch=4, dtype="float64"
        )
    )


def test_an_epoch_holds_every_window_once(paths):
    sampler = WindowSampler(paths, length=3, seed=1)
    assert len(sampler) == 4 * 2
    windows = torch.cat([sampler.batch(step, 4) for step in range(2)])
    assert windows.shape == (8, 3, 4, 8, 8)
    assert len({w.numpy().tobytes() for w in windows}) == 8
    assert not torch.equal(windows, torch.cat([sampler.batch(step, 4) for step in range(2, 4)]))


def test_a_step_is_the_same_whatever_came_before(paths):
    a, b = WindowSampler(paths, seed=2), WindowSampler(paths, seed=2)
    for step in range(5):
        a.batch(step, 3)
    assert torch.equal(a.batch(7, 3), b.batch(7, 3))


def test_a_window_longer_than_the_data_is_refused(paths):
    with pytest.raises(ValueError, match="4 frames"):
        WindowSampler(paths, length=5)


def test_symmetries_map_solutions_to_solutions():
    spec = StateSpec.euler2d()
    solver = EulerSolver(spec, dtype=torch.float64, compile=False)
    path = solver.rollout(riemann4(1, (12, 12), seed=1), [0.0, 0.1])
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(12):
        moved = random_symmetry(path, spec, rng)
        seen.add(moved.numpy().tobytes())
        solved = solver.rollout(moved[:, 0], [0.1])[:, 0]
        assert float((solved - moved[:, 1]).abs().max()) < 1e-12
    assert len(seen) > 8


def test_declared_symmetries_and_translations_map_solutions_to_solutions():
    signs = [Symmetry(flips=(True, True), shifts=(0, 1)), Symmetry(flips=(True, False), shifts=(0, 4), odd=("vorticity",))]
    spec = StateSpec.fields("vorticity", conserved={"vorticity": "vorticity"}, symmetries=signs, translations=(0,))
    solver = VorticitySolver(viscosity=0.02, cfl=0.5)
    path = solver.rollout(random_vorticity(1, 32, seed=0), torch.tensor([0.0, 0.1]))
    rng, seen = np.random.default_rng(0), set()
    for _ in range(12):
        moved = random_declared(path, spec, rng)
        seen.add(moved.numpy().tobytes())
        solved = solver.rollout(moved[:, 0], torch.tensor([0.1]))[:, 0]
        assert float((solved - moved[:, 1]).abs().max()) < 3e-5
    assert len(seen) > 8
    free = StateSpec.fields("vorticity", conserved="all")
    assert torch.equal(random_declared(path, free, rng), path)
