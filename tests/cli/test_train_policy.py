"""``ttcfast train_policy``: what is wrong is one line and a status, and a simulator that fails is told."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

import ttcfast.pwm.train_policy as module
from tests.cli.test_protocol import SMALL
from tests.pwm.envs.points import Point
from tests.pwm.test_train_policy import Rotation
from tests.replays import episode, write_replays
from ttcfast.cli.main import main
from ttcfast.data.replay_shard import Episode, write_shard


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(module, "make_env", lambda task, action_repeat: Rotation())
    return write_replays(tmp_path / "data", 4)


def train(data: Path, *words: str) -> int:
    return main(["train_policy", *SMALL, f"data={data}", f"out={data.parent / 'out'}", *words])


def one_line(capsys) -> str:
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("ttcfast: ")
    return text


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("horizon=41", 2, "horizon is 41; the longest of the 2 episodes of {data} that are trained on has 40 steps: give at most that"),
        ("eval_horizon=41", 2, "eval_horizon is 41; the longest of the 2 episodes of {data} that are held out has 40 steps"),
        ("arm=heun", 2, "arms is 'heun'; it must be mlp, residual, or heun or euler with its substeps"),
        ("agent.entropy=0.1", 2, "unknown key 'agent.entropy'"),
    ],
)
def test_wrong_settings_are_one_line_and_a_status(data, capsys, words, status, message):
    assert train(data, *words.split()) == status
    assert message.format(data=data) in one_line(capsys)


def test_wrong_data_are_one_line_and_a_status(data, capsys, monkeypatch):
    shard = data / "a.pt"
    whole = shard.read_bytes()
    for damaged in (whole[: len(whole) // 2], bytes([*whole[:900], whole[900] ^ 4, *whole[901:]])):
        shard.write_bytes(damaged)
        assert train(data) == 1
        assert f"replay shard {shard} is" in (text := one_line(capsys)) and "make or copy it again" in text
    shard.write_bytes(whole)
    write_shard(data / "b.pt", [episode(9)], {"task": "other", "number": 0, "action_dim": 1})
    assert train(data) == 1
    assert f"{data / 'b.pt'} holds other as task 0, {shard} rotation: read them apart" in one_line(capsys)
    (data / "b.pt").unlink()
    monkeypatch.undo()
    assert train(data) == 2
    assert "task is 'rotation'; it must be one of 'walker-stand', " in one_line(capsys), "a simulator of no known task"


def test_what_another_arm_left_is_one_line_and_a_status(data, capsys):
    assert train(data, "arm=mlp") == 0
    for file in ("result.json", "training.safetensors"):
        assert train(data, "arm=residual") == 1
        text = one_line(capsys)
        assert f"{file} is of a run with other settings (arm 'mlp', now 'residual'; alg.model._target_ '" in text and len(text) < 600
        (data.parent / "out" / file).unlink()


def test_a_failing_simulator_is_told(data, capsys, caplog, monkeypatch):
    monkeypatch.setattr(Rotation, "failing", frozenset(range(10_000, 30_000)))
    assert train(data, "arm=mlp") == 0
    said = capsys.readouterr().out
    assert "3 episodes were dropped, in which the simulator failed" in said and "return nan" in said
    (warning,) = (record.getMessage() for record in caplog.records if "dropped" in record.getMessage())
    assert warning.endswith("in which the simulator failed: rotation raised RuntimeError: the simulator has diverged, at step 8")


def test_a_worker_that_ends_is_one_line_and_a_status(data, capsys, monkeypatch):
    still = Episode(torch.randn(41, 2), torch.zeros(40, 1), torch.zeros(40), 0)
    write_shard(data / "a.pt", [still] * 4, {"task": "point", "number": 0, "action_dim": 1})
    dies = partial(Point, steps=5, fails="exit", seeds=(10_000,))
    monkeypatch.setattr(module, "task_of", lambda *_: ("point", dies))
    assert train(data, "arm=mlp", "processes=1") == 1
    assert "worker 1 of 1" in (text := one_line(capsys)) and "environment 0" in text and not (data.parent / "out" / "result.json").exists()
