"""What a user can get wrong, command by command: one line that names the argument or file and the remedy, not the unforeseen's."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from tests.replays import write_replays
from ttcfast.cli.main import main
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import OutOfMemoryError, memory_errors

ROOT = Path(__file__).resolve().parents[2]
DEEP = "[" * 100_000
DEEP_MAPPING = '{"a":' * 50_000
OFTEN = ["val_every=2", "save_every=1", "log_every=1"]
SMALL = ["grid=8", "frames=3", "t_end=0.05", "presets=[riemann4]", "per_file=2", "batch=2"]
VIT = ["model.patch=4", "model.width=8", "model.depth=1", "model.heads=2", "model.refine=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with data, and what the commands make of them, tiny."""
    at = tmp_path_factory.mktemp("made")
    for split, n in (("train", 4), ("valid", 2), ("test", 2), ("reward", 4)):
        assert main(["generate", *SMALL, f"out={at}/data", f"n={n}", f"split={split}"]) == 0
    write_replays(at / "replays")
    for name in ("train_fm", "build_prm_data", "train_prm", "train_prm_on_policy", "fit_directions"):
        assert main(command(name, at, at / name)) == 0
    return at


def command(name: str, at: Path, out: Path) -> list[str]:
    """A command that works on the files below ``at``."""
    fm = f"{at}/train_fm/surrogate.safetensors"
    optim = ["optim.steps=2", "optim.batch=2", "data.valid=0.25", "data.valid_samples=4", "data.valid_groups=0"]
    arguments = {
        "generate": [*SMALL, "n=2", "split=train"],
        "train_fm": [f"data={at}/data", *VIT, "batch=2", "valid=2", "warmup=0", "steps=2", *OFTEN],
        "build_prm_data": [f"fm.ckpt={fm}", f"data.root={at}/data", "builder.K=4", "builder.T_prm=2", "stochastic.latent_sigma=0.1"],
        "train_prm": [f"data.root={at}/build_prm_data", "model.width=4", "model.depth=2", *optim, *OFTEN],
        "train_prm_on_policy": [
            f"fm={fm}",
            f"data={at}/data",
            "model.width=[4,4]",
            "model.levels=2",
            "steps=2",
            "batch=2",
            "valid=2",
            *OFTEN,
        ],
        "fit_directions": [f"data={at}/build_prm_data", "rank=2", "valid=0.25"],
        "run_ttc": [f"fm.ckpt={fm}", f"data.root={at}/data", "eval.rollout_T=2", "ttc.branching_factor=3", "use_prm=false"],
        "ceiling": [f"fm.ckpt={fm}", f"data.root={at}/data", "data.n=1", "states=[0]", "factors=[2]"],
        "train_wm": [f"data={at}/replays", "steps=2", "batch=8", "horizon=2", "arms=[mlp]", "seeds=[0]"],
    }[name]
    return [name, *arguments, f"out={out}/directions.safetensors" if name == "fit_directions" else f"out={out}"]


def refused(capsys, arguments: list[str], *words: str) -> int:
    """The status of a command that must end with one real line, which holds ``words``."""
    capsys.readouterr()
    status = main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ttcfast: ")]
    assert status in (1, 2) and len(lines) == 1, (status, lines)
    assert "--debug shows where" not in lines[0]
    assert all(word in lines[0] for word in words), lines[0]
    return status


@pytest.mark.parametrize("name", ["train_fm", "build_prm_data", "train_prm", "train_prm_on_policy", "run_ttc", "ceiling"])
def test_no_command_computes_on_meta(made, tmp_path, capsys, name):
    assert refused(capsys, [*command(name, made, tmp_path), "device=meta"], "device is 'meta'") == 2


@pytest.mark.parametrize("name", ["generate", "train_wm"])
@pytest.mark.parametrize(
    "device", ["meta", "foo:3", "cpu:7", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="GPU"))]
)
def test_a_device_that_is_not_there(made, tmp_path, capsys, name, device):
    assert refused(capsys, [*command(name, made, tmp_path), f"device={device}"], f"device is '{device}'") == 2


@pytest.mark.parametrize(
    ("name", "key"),
    [("generate", "seed"), ("generate", "t_end"), ("train_fm", "lr"), ("train_prm", "optim.lr"), ("fit_directions", "rank")],
)
@pytest.mark.parametrize("value", ["nan", "inf", str(2**64), "-1" + "0" * 400])
def test_numbers_that_no_setting_can_be(made, tmp_path, capsys, name, key, value):
    assert refused(capsys, [*command(name, made, tmp_path), f"{key}={value}"], f"{key} is ") == 2


def entry(*path: str, to: Any = None) -> Callable[..., None]:
    """A change of a checkpoint's meta: the entry removed, or set."""

    def change(tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        for part in path[:-1]:
            meta = meta[part]
        if to is None:
            del meta[path[-1]]
        else:
            meta[path[-1]] = to

    return change


def every(prefix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    """A change of a checkpoint's tensors whose names begin with ``prefix``."""

    def changed(tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        found = [n for n, t in tensors.items() if n.startswith(prefix) and t.ndim]
        assert found
        tensors.update({n: change(tensors[n]) for n in found})

    return changed


def rewrite(source: Path, target: Path, change: Callable[..., None]) -> None:
    tensors, meta = checkpoints.load(source)
    change(tensors, meta)
    checkpoints.save(target, tensors, meta)


BAD_SURROGATES = {
    "no normaliser": entry("normalizer"),
    "no spec": entry("spec"),
    "no model": entry("model"),
    "no architecture": entry("architecture"),
    "a number for the normaliser": entry("normalizer", to=5),
    "a short mean": entry("normalizer", "mean", to=[0.0]),
    "text for the spec": entry("spec", to="x"),
    "text for gamma": entry("spec", "gamma", to="x"),
    "text for a width": entry("model", "width", to="wide"),
    "complex weights": every("", lambda t: t.to(torch.complex64)),
    "whole weights": every("", lambda t: t.long()),
    "weights that are not finite": every("", lambda t: t * torch.nan),
}


@pytest.mark.parametrize("kind", BAD_SURROGATES)
def test_checkpoints_that_describe_no_surrogate(made, tmp_path, capsys, kind):
    rewrite(made / "train_fm" / "surrogate.safetensors", tmp_path / "odd.safetensors", BAD_SURROGATES[kind])
    refused(capsys, [*command("ceiling", made, tmp_path / "out"), f"fm.ckpt={tmp_path}/odd.safetensors"], "odd.safetensors")


@pytest.mark.parametrize(
    "other", ["train_prm/model.safetensors", "train_prm", "fit_directions/directions.safetensors", "train_fm/none", "train_fm/log.csv/x"]
)
@pytest.mark.parametrize(
    ("name", "key"), [("ceiling", "fm.ckpt"), ("train_prm_on_policy", "fm"), ("train_fm", "init"), ("train_fm", "data")]
)
def test_files_of_another_kind(made, tmp_path, capsys, name, key, other):
    refused(capsys, [*command(name, made, tmp_path), f"{key}={made}/{other}"], str(made))


BAD_STATES = {
    "a tensor missing": lambda t, m: t.pop(next(n for n in t if n.startswith("model."))),
    "another shape": every("model.", lambda t: t.new_zeros(3)),
    "complex weights": every("model.", lambda t: t.to(torch.complex64)),
    "complex moments": every("training.optimizer", lambda t: t.to(torch.complex64)),
    "an average of another shape": every("training.extra.average", lambda t: t.new_zeros(2)),
    "an average of another kind": every("training.extra.average", lambda t: t.to(torch.complex64)),
    "no training state": entry("training"),
    "a number for it": entry("training", to=5),
    "an empty one": entry("training", to={"dict": [["optimizer", 1], ["random", 1], ["extra", 1]]}),
    "no extra": lambda t, m: [pair.__setitem__(1, {"dict": []}) for pair in m["training"]["dict"] if pair[0] == "extra"],
    "a list of extras": lambda t, m: [pair.__setitem__(1, [1]) for pair in m["training"]["dict"] if pair[0] == "extra"],
}


@pytest.mark.parametrize("name", ["train_fm", "train_prm", "train_prm_on_policy"])
@pytest.mark.parametrize("kind", BAD_STATES)
def test_resume_states_made_by_hand(made, tmp_path, capsys, name, kind):
    shutil.copytree(made / name, tmp_path / "out")
    rewrite(made / name / "training.safetensors", tmp_path / "out" / "training.safetensors", BAD_STATES[kind])
    refused(capsys, command(name, made, tmp_path / "out"), "training.safetensors")


@pytest.mark.parametrize("name", ["fit_directions", "train_prm", "build_prm_data"])
@pytest.mark.parametrize("attribute", ["config", "spec"])
def test_triplets_with_json_too_deep(made, tmp_path, capsys, name, attribute):
    shutil.copy(made / "build_prm_data" / "triplets.hdf5", tmp_path / "odd.hdf5")
    with h5py.File(tmp_path / "odd.hdf5", "r+") as file:
        del file.attrs[attribute]
        file.attrs.create(attribute, DEEP[:60_000])
    key = {"fit_directions": "data", "train_prm": "data.root", "build_prm_data": "out"}[name]
    refused(capsys, [*command(name, made, tmp_path / "out"), f"{key}={tmp_path}/odd.hdf5"], "odd.hdf5")


@pytest.mark.parametrize("said", [DEEP_MAPPING[:60_000], "{bad"])
def test_data_whose_parameters_are_no_json(made, tmp_path, capsys, said):
    shutil.copy(next((made / "data" / "data" / "train").glob("*.hdf5")), tmp_path / "odd.hdf5")
    with h5py.File(tmp_path / "odd.hdf5", "r+") as file:
        file.attrs["simulation_parameters"] = said
    refused(capsys, [*command("train_fm", made, tmp_path / "out"), f"data={tmp_path}/odd.hdf5"], "odd.hdf5")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"5", b"{", DEEP.encode(), b'{"methods": 5}'])
def test_a_run_whose_numbers_are_damaged(tmp_path, capsys, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_bytes(content)
    assert refused(capsys, ["report", f"{tmp_path}/run", f"out={tmp_path}/page"], str(tmp_path / "run")) == 1


@pytest.mark.parametrize("content", ["{}", '{"scores": []}'])
def test_an_evaluation_without_methods(tmp_path, capsys, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run_ttc.provenance.json").write_text("{}")
    (tmp_path / "run" / "metrics.json").write_text(content)
    assert refused(capsys, ["report", f"{tmp_path}/run", f"out={tmp_path}/page"], "metrics.json is damaged", "no methods") == 1


EMPTY = {"train_fm": "data", "build_prm_data": "data.root", "train_prm_on_policy": "data", "run_ttc": "data.root", "ceiling": "data.root"}


@pytest.mark.parametrize("name", EMPTY)
def test_data_without_a_trajectory(made, tmp_path, capsys, name):
    shutil.copytree(made / "data", tmp_path / "data")
    for path in tmp_path.rglob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            del file.attrs["ttcfast_checksum"]
            for group, field in (("t0_fields", "density"), ("t0_fields", "energy"), ("t1_fields", "momentum")):
                attributes, shape = dict(file[group][field].attrs), file[group][field].shape[1:]
                del file[group][field]
                file[group].create_dataset(field, (0, *shape), "f4", chunks=(1, *shape), maxshape=(None, *shape)).attrs.update(attributes)
    arguments = [*command(name, made, tmp_path / "out"), f"{EMPTY[name]}={tmp_path}/data"]
    assert refused(capsys, arguments, "no trajectory in", "give files that hold some") == 1


def test_a_constant_channel_by_its_name(made, tmp_path, capsys):
    shutil.copytree(made / "data", tmp_path / "data")
    for path in tmp_path.rglob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            file["t0_fields/density"][...] = 1.0
    arguments = [*command("train_fm", made, tmp_path / "out"), f"data={tmp_path}/data"]
    assert refused(capsys, arguments, "channel 0 (density)", "is constant", "give trajectories in which it varies") == 1


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="root alone can give up its right to read everything")
def test_what_the_rights_of_a_file_or_folder_forbid(made, tmp_path):
    for name in ("data", "fm", "out"):
        (tmp_path / name).mkdir()
    shutil.copy(next((made / "data").rglob("*.hdf5")), tmp_path / "data" / "a.hdf5")
    shutil.copy(made / "train_fm" / "surrogate.safetensors", tmp_path / "fm")
    for path in (tmp_path / "data" / "a.hdf5", tmp_path / "fm" / "surrogate.safetensors"):
        path.chmod(0)
    (tmp_path / "out").chmod(0o500)
    (tmp_path / "fm").chmod(0)
    cases = [
        (["train_fm", f"data={tmp_path}/data", f"out={tmp_path}/a"], "a.hdf5"),
        (command("ceiling", made, tmp_path / "b") + [f"fm.ckpt={tmp_path}/fm/surrogate.safetensors"], "surrogate.safetensors"),
        (command("generate", made, tmp_path / "out"), f"{tmp_path}/out"),
        (command("generate", made, tmp_path / "out" / "deeper"), f"{tmp_path}/out"),
        (["report", f"{tmp_path}/fm", f"out={tmp_path}/c"], f"{tmp_path}/fm"),
        (["train_fm", f"data={tmp_path}/fm", f"out={tmp_path}/d"], f"{tmp_path}/fm"),
        (["fit_directions", f"data={tmp_path}/fm", f"out={tmp_path}/e.safetensors"], f"{tmp_path}/fm"),
        (["train_wm", f"data={tmp_path}/fm", f"out={tmp_path}/f"], f"{tmp_path}/fm"),
    ]
    code = f"from ttcfast.cli.main import main\nfor case in {[arguments for arguments, _ in cases]!r}: print(main(case))"
    without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    ran = subprocess.run([*without, sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    lines = [line for line in ran.stderr.splitlines() if line.startswith("ttcfast: ")]
    assert len(lines) == len(cases) and "0" not in ran.stdout.split(), (ran.stdout, ran.stderr)
    for line, (_, named) in zip(lines, cases):
        assert named in line and "--debug" not in line and ("ermission denied" in line or "readable" in line), line


def test_names_that_look_like_markup(made, tmp_path, capsys):
    assert refused(capsys, [*command("generate", made, tmp_path / "a"), "presets=['[red]x','[/x]']"], "presets is '[red]x'") == 2
    assert main([*command("generate", made, tmp_path / "[old] [/x]")]) == 0
    assert str(tmp_path / "[old] [/x]") in capsys.readouterr().out


def test_keys_with_paths_are_taken_literally(made, tmp_path, capsys):
    for key in ("ttc.stochastic.directions", "stochastic.directions"):
        arguments = [*command("run_ttc", made, tmp_path), f"{key}=a, b(1)"]
        assert refused(capsys, arguments, "a, b(1)") == 1
    assert refused(capsys, [*command("train_prm", made, tmp_path), "model.init=20240101"], "20240101") == 1


def test_an_interpreters_error_without_a_reason_is_memory_under_a_limit_only(monkeypatch):
    limit = [resource.RLIM_INFINITY]
    monkeypatch.setattr("resource.getrlimit", lambda which: (limit[0], resource.RLIM_INFINITY))
    for kind in (SystemError, OutOfMemoryError):
        with pytest.raises(kind), memory_errors():
            raise SystemError("error return without exception set")
        limit[0] = 2**30


def test_a_list_of_triplets_that_is_no_text(made, tmp_path, capsys):
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe")
    assert refused(capsys, [*command("train_prm", made, tmp_path), f"data.root={tmp_path}/list.txt"], "list.txt is no text") == 1
