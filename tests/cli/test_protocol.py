"""``ttcfast protocol`` from its arguments to its files, its page and its words."""

from __future__ import annotations

import csv
import json

import pytest

from tests.replays import write_replays
from tests.simulators import needs_dm_control
from ttcfast.cli.configuration import compose
from ttcfast.cli.main import main
from ttcfast.cli.protocol import LAYOUT
from ttcfast.cli.typed import build
from ttcfast.pwm.collect import CollectConfig, collect
from ttcfast.pwm.protocol import ProtocolConfig, protocol

SMALL = ["alg.model.latent_dim=8", "alg.model.units=[16,16]", "alg.model.encoder_units=[16]", "alg.model.num_bins=21", "warmup=1"]
SMALL += ["agent.actor.units=[16]", "agent.critic.units=[16]", "agent.horizon=2", "wm_steps=4", "steps=2", "batch=4", "horizon=2"]
SMALL += [
    "starts=4",
    "esnr_microbatches=2",
    "eval_every=1",
    "eval_episodes=1",
    "final_episodes=1",
    "held_out=0.5",
    "alg.parity.tolerance=0.2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cartpole")
    collect(CollectConfig(out=str(folder), episodes=2, per_shard=2, action_repeat=20))
    return folder


@needs_dm_control
def test_a_protocol_writes_table_figures_verdict_and_provenance_and_its_page(data, tmp_path, capsys):
    out = tmp_path / "out"
    words = [*SMALL, f"data={data}", f"out={out}", "seeds=[0]"]
    protocol(LAYOUT.build(compose("protocol", [*words, "arms=[mlp]"])))
    first = (out / "cartpole-swingup" / "mlp_seed0" / "result.json").stat().st_mtime_ns
    assert main(["protocol", *words, "arms=[mlp,euler1]"]) == 0
    said = capsys.readouterr().out
    assert "Best flow arm by these returns: flow, Euler K = 1" in said and f"Page: ttcfast report {out}" in said
    assert (out / "cartpole-swingup" / "mlp_seed0" / "result.json").stat().st_mtime_ns == first
    for name in ("table.csv", "runs.csv"):
        with open(out / name, newline="") as file:
            assert [(row["task"], row["arm"]) for row in csv.DictReader(file)] == [("cartpole-swingup", a) for a in ("mlp", "euler1")]
    held = json.loads((out / "metrics.json").read_text())
    assert held["provenance"]["config"]["arms"] == ["mlp", "euler1"] and len(held["runs"]) == 2
    assert any("Acceptance of the plan" in sentence for sentence in held["verdict"])
    assert all(sentence in (out / "table.md").read_text() for sentence in held["verdict"])
    figures = {path.stem for path in (out / "figures").glob("*.png")}
    assert figures == {"learning_curves", "esnr", "gradient_cosine", "values", "endpoint_error", "performance_profile"}
    assert main(["report", str(out), f"out={tmp_path / 'page'}"]) == 0
    assert held["verdict"][0].split(".")[0] in (tmp_path / "page" / "report.html").read_text()


def test_arms_are_swept_by_multirun_each_in_its_folder(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr("ttcfast.cli.protocol.run", found.append)
    assert main(["protocol", "--multirun", "arms=[mlp],[heun2,heun4]", "seeds=[0]", f"out={tmp_path}"]) == 0
    assert [(run["arms"], run["seeds"]) for run in found] == [(["mlp"], [0]), (["heun2", "heun4"], [0])]
    assert [run["out"] for run in found] == [f"{tmp_path}/arms-_mlp", f"{tmp_path}/arms-_heun2_heun4"]


def test_the_shipped_values_are_those_of_the_dataclass():
    values = compose("protocol", [])
    config = build(ProtocolConfig, values)
    assert all(getattr(config, name) == getattr(ProtocolConfig(), name) for name in values if name not in ("alg", "agent"))
    assert config.alg["parity"]["on_violation"] == "abort"
    assert compose("protocol", ["data=[a,b]"])["data"] == ["a", "b"] and compose("protocol", ["agent=pwm"])["agent"]["detach"] is True


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("arms=[mlp,flow]", 2, "arms is 'flow'; it must be mlp, residual, or heun or euler with its substeps"),
        ("arms=[mlp,mlp]", 2, "arms is ['mlp', 'mlp']; give at least one, each once"),
        ("data={tmp}/none", 1, "make some with `ttcfast collect"),
        ("data=[{tmp}/data,{tmp}/other]", 2, "both of rotation; give one folder per task"),
        ("data={tmp}/data agent=pwn", 2, "agent is 'pwn'; it must be one of 'control', 'pwm'"),
        ("data={tmp}/data alg.parity.tolerance=0", 2, "more than the tolerance of 0.0%"),
        ("data={tmp}/data mode=on", 2, "mode is"),
    ],
)
def test_wrong_input_is_one_line_and_a_status(capsys, tmp_path, arguments, status, message):
    for name in ("data", "other"):
        write_replays(tmp_path / name, 4)
    given = [f"out={tmp_path / 'out'}", *SMALL, *arguments.format(tmp=tmp_path).split()]
    assert main(["protocol", *given]) == status
    text = capsys.readouterr().err
    assert message in text and text.strip().splitlines()[-1].startswith("ttcfast: ")
