"""``ttcfast collect`` from its arguments to its files and its words."""

from __future__ import annotations

import json

import pytest

from tests.simulators import needs_dm_control
from ttcfast.cli.main import main
from ttcfast.data.replay import ReplaySet

SMALL = ["episodes=2", "per_shard=1", "action_repeat=10", "controllers.random=1", "controllers.swingup=1"]


@needs_dm_control
def test_collect_writes_shards_and_their_provenance(tmp_path, capsys):
    assert main(["collect", *SMALL, f"out={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "2 shards with 200 steps" in said and "cartpole-swingup, random: 1 episodes" in said and "swingup: 1 episodes" in said
    assert len(ReplaySet.open(tmp_path)) == 2
    record = json.loads((tmp_path / "collect.provenance.json").read_text())
    assert record["seeds"] == {"seed": 0} and record["versions"]["mujoco"].startswith("3.")


@needs_dm_control
def test_collect_takes_any_task_as_it_is_and_any_share(tmp_path, capsys):
    few = ["episodes=1", "action_repeat=100"]
    assert main(["collect", "tasks=[finger-spin]", *few, f"out={tmp_path / 'spin'}"]) == 0
    assert "finger-spin, random: 1 episodes" in capsys.readouterr().out
    assert main(["collect", "controllers={random: 1.0}", *few, f"out={tmp_path / 'pole'}"]) == 0
    assert "cartpole-swingup, random: 1 episodes" in capsys.readouterr().out


def test_spaces_that_are_no_boxes_are_one_line_and_a_status(tmp_path, capsys):
    pytest.importorskip("gymnasium", reason="gymnasium is not installed; pip install 'ttcfast[gym]' brings it")
    for name, what in (("CartPole-v1", "action_space"), ("FrozenLake-v1", "observation_space")):
        assert main(["collect", f"tasks=[gymnasium:{name}]", f"out={tmp_path}"]) == 2
        text = capsys.readouterr().err
        assert f"{what} of gymnasium:{name} is Discrete(" in text and "only Box" in text and text.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("episodes=0", 2, "episodes is 0; it must be at least 1"),
        ("controllers.expert=1", 2, "controllers is 'expert'; it must be one of 'random', 'swingup'"),
        ("tasks=[finger-spin] controllers.swingup=1", 2, "finger-spin is none; leave controllers out, or give controllers={random: 1.0}"),
        ("tasks=[cartpole]", 2, "tasks is 'cartpole'; it must be one of"),
        ("noise=[0]", 2, "noise is [0.0]; give [low, high]"),
        ("out=/dev/null/x", 1, "cannot write to folder /dev/null/x"),
    ],
)
def test_wrong_input_is_one_line_and_a_status(capsys, arguments, status, message):
    assert main(["collect", *arguments.split()]) == status
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1
