"""The parts that training runs share: their clock, learning rate, averaged weights, and the settings of a resume."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from ttcfast.runtime.errors import CheckpointError
from ttcfast.runtime.training import Stopwatch, adamw, learning_rate, require_same_settings, update_average


def test_processor_time_does_not_count_sleep_and_wall_time_does():
    watches = {clock: Stopwatch(clock) for clock in ("wall", "cpu")}
    time.sleep(0.2)
    assert watches["wall"].seconds() >= 0.2 > watches["cpu"].seconds()
    watches["cpu"].restart_at(100.0)
    assert 100 <= watches["cpu"].seconds() < 101


def test_the_learning_rate_rises_and_falls():
    assert [learning_rate(2.0, step, 4, 0.0) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(2.0, 4, 4, 0.0) == 2.0
    assert learning_rate(2.0, 9, 4, 0.5) == pytest.approx(2.0 * (0.01 + 0.99 / 2))
    assert learning_rate(2.0, 9, 4, 1.0) == pytest.approx(0.02)
    assert learning_rate(2.0, 9, 4, 1.0, cosine=False) == 2.0


def test_biases_do_not_decay():
    layer = nn.Linear(3, 2)
    groups = adamw(layer.parameters(), 1e-3, 0.1).param_groups
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups] == [(0.1, [2]), (0.0, [1])]


def test_the_average_follows_faster_at_first():
    average = {"w": torch.zeros(2)}
    update_average(average, [torch.ones(2)], 0.99, 0)
    torch.testing.assert_close(average["w"], torch.full((2,), 0.9))
    update_average(average, [torch.zeros(2)], 0.99, 10_000)
    torch.testing.assert_close(average["w"], torch.full((2,), 0.9 * 0.99))


def test_other_settings_are_named():
    require_same_settings("a.safetensors", {"seed": 0, "old": 1}, {"seed": 0})
    with pytest.raises(CheckpointError, match=r"a\.safetensors is of a run with other settings \(seed 0, now 1\); .*resume=false"):
        require_same_settings("a.safetensors", {"seed": 0}, {"seed": 1})
