"""``ttcfast build_prm_data`` from its arguments to its file and its words."""

from __future__ import annotations

import pytest

from tests.rewards.prm.triplets.test_build import content
from tests.small_run import write_surrogate
from ttcfast.cli.main import main
from ttcfast.data.generate import GenerateConfig, generate
from ttcfast.rewards.prm.triplets.file import TripletFile


def test_the_plans_name_of_the_split_is_the_reward_split(tmp_path, capsys):
    common = {"out": str(tmp_path / "data"), "presets": ("riemann4",), "grid": 16, "frames": 3, "t_end": 0.1, "batch": 2}
    for split, n in (("train", 2), ("reward", 1)):
        generate(GenerateConfig(split=split, n=n, per_file=2, **common))
    checkpoint = write_surrogate(tmp_path / "surrogate.safetensors")
    made = {}
    for split, out in (("train_small", "train_small"), ("reward", "reward"), ("train", "all.HDF5")):  # folders, and a file
        words = f"fm.ckpt={checkpoint} data.root={tmp_path / 'data'} data.train_split={split} builder.K=3 builder.T_prm=2"
        assert main(["build_prm_data", *words.split(), f"out={tmp_path / out}"]) == 0, capsys.readouterr().err
        made[split] = TripletFile(tmp_path / out)
    assert not list(tmp_path.rglob("*.lock"))
    assert content(tmp_path / "train_small" / "triplets.hdf5") == content(tmp_path / "reward" / "triplets.hdf5")
    assert made["train_small"].config == made["reward"].config and made["reward"].config["source"].endswith("split reward")
    assert (len(made["train_small"]), len(made["train"])) == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("builder.K=2", "builder.K is 2; best, median and worst need at least 3 candidates"),
        ("builder.units=si", "builder.units is 'si'; it must be one of"),
        ("fm.ckpt=nowhere", "checkpoint nowhere does not exist"),
        ("data.n=0", "data.n is 0; it must be at least 1"),
    ],
)
def test_the_command_says_what_is_wrong(capsys, tmp_path, arguments, message):
    assert main(["build_prm_data", f"out={tmp_path}", *arguments.split()]) != 0
    assert message in capsys.readouterr().err
