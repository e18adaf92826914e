"""``run_ttc`` and ``train_fm`` on files of every format: the same states reach the surrogate, whatever variables the file holds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.data.layouts import flow, total_energy, write_pdebench, write_pdegym, write_the_well
from tests.small_run import write_surrogate
from ttcfast.cli.main import main
from ttcfast.evaluation.reading import read_problems
from ttcfast.models import load_surrogate

WRITERS = {"well": write_the_well, "pdegym": write_pdegym, "pdebench": write_pdebench}
GAMMAS = {"well": 1.4, "pdegym": 1.4, "pdebench": 5 / 3}
SHORT = ["eval.rollout_T=3", "ttc.branching_factor=2", "stochastic.latent_sigma=0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_surrogate(tmp_path_factory.mktemp("surrogate") / "surrogate.safetensors", grid=8)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take most of a run and know nothing of formats."""
    monkeypatch.setattr("ttcfast.report.outputs.figures", lambda *given: iter(()))


@pytest.fixture(params=WRITERS)
def kind(request):
    return request.param


@pytest.fixture
def path(kind, tmp_path):
    place = tmp_path / "2D_CFD_periodic.hdf5"
    WRITERS[kind](place, 3)
    return place


def said(capsys) -> str:
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text


def test_run_ttc_works_on_it(kind, path, checkpoint, tmp_path):
    given = [f"fm.ckpt={checkpoint}", f"data.root={path}", f"data.format={kind}", "data.split=null", *SHORT, f"out={tmp_path / 'out'}"]
    assert main(["run_ttc", *given]) == 0
    held = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert held["problems"] == 3 and all(np.isfinite(m["mse_step_1"]) for m in held["methods"])
    assert any(m["projection"] for m in held["methods"])  # the domain is known to be periodic
    assert held["provenance"]["config"]["reading"]["format"] == kind
    notes = " ".join(held["notes"])
    assert ("converted to the surrogate's" in notes) == (kind != "well")
    assert ("The data have gamma 1.66667; the surrogate was trained with 1.4." in notes) == (kind == "pdebench")


def test_the_surrogate_sees_conserved_variables(kind, path, checkpoint):
    problems, source = read_problems(load_surrogate(checkpoint), str(path), 2, count=2)
    rho, (u, v), pressure = flow(3, 5, (8, 8))
    energy = total_energy(rho, [u, v], pressure, GAMMAS[kind])
    torch.testing.assert_close(problems.truth, torch.from_numpy(np.stack([rho, rho * u, rho * v, energy], 2)[:2]), rtol=1e-6, atol=1e-6)
    assert problems.spec.gamma == pytest.approx(GAMMAS[kind]) and problems.spec.cell_volume == pytest.approx(1 / 64, rel=1e-5)
    assert problems.can_project() and len(source.times) == 5


def test_gammas_of_several_files_go_with_their_problems(checkpoint, tmp_path):
    for i, gamma in enumerate((1.2, 1.6)):
        write_the_well(tmp_path / f"{i}.hdf5", 2, gamma=gamma)
    given = [f"fm.ckpt={checkpoint}", f"data.root={tmp_path}", "data.split=null", *SHORT, f"out={tmp_path / 'out'}"]
    assert main(["run_ttc", *given]) == 0
    held = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "The data have gamma 1.2, 1.6; the surrogate was trained with 1.4." in held["notes"]
    assert read_problems(load_surrogate(checkpoint), str(tmp_path), 2)[0].spec.gamma.tolist() == [1.2, 1.6, 1.2, 1.6]


def test_a_folder_of_chunks_in_either_order(checkpoint, tmp_path):
    folder = tmp_path / "CE-CRP"
    folder.mkdir()
    for chunk in range(11):
        write_pdegym(folder / f"data_{chunk}.nc", 1, frames=3, seed=chunk)
    seen = {}
    for order in ("numeric", "lexicographic"):
        keys = ["data.split=test", "data.split_counts=[8,2,1]", f"data.chunk_order={order}", "eval.oracle=false", "eval.projection=false"]
        assert main(["run_ttc", f"fm.ckpt={checkpoint}", f"data.root={folder}", *keys, *SHORT, f"out={tmp_path / order}"]) == 0
        seen[order] = json.loads((tmp_path / order / "metrics.json").read_text())["methods"][1]["mse_step_1"]
    assert seen["numeric"] != seen["lexicographic"]  # chunk 10 is the test split, or chunk 9


def test_wrong_input_is_one_line(checkpoint, tmp_path, capsys):
    folder = tmp_path / "CE-CRP"
    folder.mkdir()
    write_pdegym(folder / "data_0.nc", 2, grid=16)
    run = ["run_ttc", f"fm.ckpt={checkpoint}", f"data.root={folder}", f"out={tmp_path / 'out'}", *SHORT]
    assert main([*run, "data.chunk_order=random"]) == 2
    assert "data.chunk_order is 'random'; it must be one of 'numeric', 'lexicographic'" in said(capsys)
    assert main([*run, "data.format=netcdf"]) == 2
    assert "data.format is 'netcdf'; it must be one of" in said(capsys)
    assert main([*run]) == 1
    assert "2 trajectories, but the splits are train 9640" in said(capsys)
    assert main([*run, "data.split=null"]) == 1
    assert "has 16 x 16 cells; the surrogate of" in said(capsys)
    assert main([*run, "data.split=null", "data.format=pdebench"]) == 1
    assert "no .hdf5 file in" in said(capsys)
    write_pdebench(tmp_path / "3D_periodic.hdf5", 1, shape=(8, 8, 8))
    assert main([*run, f"data.root={tmp_path / '3D_periodic.hdf5'}", "data.split=null"]) == 1
    assert "has 8 x 8 x 8 cells" in said(capsys)


def test_a_surrogate_is_trained_on_it_in_conserved_variables(tmp_path, capsys):
    write_pdegym(tmp_path / "CE-KH.nc", 6, frames=3)
    sizes = [f"model.{size}" for size in ("patch=4", "width=8", "depth=1", "heads=2", "refine=2")]
    given = [f"data={tmp_path / 'CE-KH.nc'}", "data.format=pdegym", "data.split_counts=[4,1,1]", "batch=2", "steps=2", "warmup=0", *sizes]
    assert main(["train_fm", *given, f"out={tmp_path / 'out'}"]) == 0
    surrogate = load_surrogate(tmp_path / "out" / "surrogate.safetensors")
    assert surrogate.spec.variables == "conserved" and surrogate.spec.num_channels == 4 and surrogate.spec.gamma == 1.4
    held = write_pdegym(tmp_path / "again.nc", 6, frames=3)
    assert float(surrogate.normalizer.mean[3]) == pytest.approx(float(held[:4, :, 4].mean(dtype=np.float64)), rel=1e-5)
    capsys.readouterr()
    assert main(["train_fm", *given, "data.split_counts=[5,0,1]", f"out={tmp_path / 'other'}"]) == 1
    assert "split valid holds no trajectory" in said(capsys)
