"""``ttcfast train_wm`` from its arguments to its files and its words."""

from __future__ import annotations

import csv
import json

import pytest
import yaml

from tests.replays import write_replays
from ttcfast.cli.configuration import compose
from ttcfast.cli.main import main
from ttcfast.cli.typed import build
from ttcfast.pwm.checkpoint import load_world_model
from ttcfast.pwm.train_wm import TrainWMConfig

SMALL = ["alg.model.latent_dim=16", "alg.model.units=[16,16]", "alg.model.encoder_units=[16]", "batch=8", "horizon=2", "eval_horizon=3"]
SMALL += ["steps=2", "warmup=0", "seeds=[0,1]", "arms=[mlp,euler1]", "held_out=0.2"]


def test_train_wm_writes_table_figure_checkpoints_and_provenance(tmp_path, capsys):
    data, out = write_replays(tmp_path / "data"), tmp_path / "out"
    assert main(["train_wm", "alg=pwm_cpu_flow", *SMALL, f"data={data}", f"out={out}"]) == 0
    said = capsys.readouterr().out
    assert "nothing changes" in said and "flow, Euler K = 1" in said and f"{out}/table.csv" in said
    with open(out / "table.csv", newline="") as file:
        assert [row["arm"] for row in csv.DictReader(file)] == ["persistence", "mlp", "euler1"]
    with open(out / "runs.csv", newline="") as file:
        assert [(row["arm"], row["seed"]) for row in csv.DictReader(file)] == [("mlp", "0"), ("mlp", "1"), ("euler1", "0"), ("euler1", "1")]
    assert (out / "endpoint_error.png").stat().st_size > 20_000 and "| MLP |" in (out / "table.md").read_text()
    assert json.loads((out / "metrics.json").read_text())["provenance"]["config"]["steps"] == 2
    assert yaml.safe_load((out / "train_wm.yaml").read_text())["alg"]["model"]["_target_"].endswith("FlowWorldModel")
    assert load_world_model(out / "mlp_seed1" / "world_model.safetensors").model.latent_dim == 16


@pytest.mark.parametrize(
    ("argument", "status", "message"),
    [
        ("alg.parity.tolerance=0", 2, "more than the tolerance of 0.0%; change units"),
        ("alg.model.latent_dim=20", 2, "latent_dim is 20"),
        ("eval_horizon=41", 2, "eval_horizon is 41; the longest of the"),
        ("held_out=1", 2, "held_out is 1"),
        ("alg.wm.lr=fast", 2, "alg.wm.lr is 'fast'; give a number"),
        ("alg.model.latent_dim=wide", 2, "alg.model.latent_dim is 'wide'; give a number"),
    ],
)
def test_settings_that_fit_neither_data_nor_model_are_one_line(tmp_path, capsys, argument, status, message):
    data = write_replays(tmp_path / "data", 4)
    assert main(["train_wm", *SMALL, "arms=[heun2]", f"data={data}", f"out={tmp_path / 'out'}", argument]) == status
    text = capsys.readouterr().err
    assert message in text and text.strip().splitlines()[-1].startswith("ttcfast: ")


def test_the_group_is_chosen_by_its_name():
    assert compose("train_wm", ["alg=pwm_5M"])["alg"]["model"]["latent_dim"] == 512
    assert compose("train_wm", ["alg=pwm_5M", "alg.wm.lr=1e-4"])["alg"]["wm"]["lr"] == 1e-4


def test_the_shipped_values_are_those_of_the_dataclass():
    values = compose("train_wm", [])
    config = build(TrainWMConfig, values)
    assert all(getattr(config, name) == getattr(TrainWMConfig(), name) for name in values if name != "alg")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("steps=0", 2, "steps is 0; it must be at least 1"),
        ("arms=[heun]", 2, "arms is 'heun'; it must be mlp, residual, or heun or euler with its substeps"),
        ("alg=pwm_7M", 2, "alg is 'pwm_7M'; it must be one of 'pwm_19M', "),
        ("alg=[1]", 2, "alg is '[1]'; it must be one of"),
        ("alg.wm.learning_rate=1", 2, "unknown key 'alg.wm.learning_rate'"),
        ("data={tmp}/none", 1, "make some with `ttcfast collect"),
        ("out=/dev/null/x", 1, "cannot write to folder /dev/null/x"),
    ],
)
def test_wrong_input_is_one_line_and_a_status(capsys, tmp_path, arguments, status, message):
    given = [f"out={tmp_path / 'out'}", *arguments.format(tmp=tmp_path).split()]
    assert main(["train_wm", *given]) == status
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1
