"""What training runs share: the loop, the clock, the learning rate, the averaged weights, and the settings of a resume."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ttcfast.runtime.errors import CheckpointError
from ttcfast.runtime.logs import read_log
from ttcfast.runtime.training import Stopwatch, TrainingError, TrainingRun, adamw, learning_rate, require_same_settings, update_average


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
    before, now = ({"alg": {"wm": {"lr": lr, "clip": 1}, "units": [8, lr]}, "arm": arm} for lr, arm in ((1, "mlp"), (2, "flow")))
    same = r"\(arm 'mlp', now 'flow'; alg.units \[8, 1\], now \[8, 2\]; alg.wm.lr 1, now 2\)"
    with pytest.raises(CheckpointError, match=same):
        require_same_settings("a.safetensors", before, now)
    with pytest.raises(CheckpointError, match=r"\(alg.e 1, now None; alg.a None, now 1; .*; 1 more\)"):
        require_same_settings("a.safetensors", {"alg": {"e": 1}}, {"alg": {"e": None, **dict.fromkeys("abcd", 1)}})


@dataclass(frozen=True)
class Options:
    steps: int = 5
    lr: float = 0.1
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 0.0
    ema: float = 0.9
    log_every: int = 10
    val_every: int = 2
    save_every: int = 2
    resume: bool = True
    tensorboard: bool = False
    wandb: None = None


class Trainer(TrainingRun):
    """Two weights drawn to 1 by noisy gradients."""

    def __init__(self, out, config, *, stop_at=None, fail_at=None, max_seconds=None):
        self.out, self.config, self.steps, self.max_seconds = out, config, config.steps, max_seconds
        torch.manual_seed(0)
        self.model = nn.Linear(2, 1, bias=False)
        self.start_optimizer()
        self.watch, self.stop_at, self.fail_at = Stopwatch(), stop_at, fail_at
        self.made, self.validated, self.written = [], [], []

    def step(self, step):
        if step == self.fail_at:
            raise KeyboardInterrupt
        self.made.append(step)
        loss = (self.model.weight - 1 + 0.1 * torch.randn(1, 2)).square().sum()
        return self.descend(loss, step, {"loss": loss})

    def validate(self, step):
        self.validated.append(step)
        return {"at": float(step)}

    def saved(self, step):
        self.written.append(step)

    def stopped(self):
        return self.stop_at is not None and self.done >= self.stop_at


def test_a_run_validates_and_saves_on_its_schedule_and_at_its_end(tmp_path):
    run = Trainer(tmp_path, Options())
    assert run.train() == {"at": 5.0}
    assert (run.made, run.validated, run.written) == ([0, 1, 2, 3, 4], [2, 4, 5], [2, 4, 5])
    assert [entry["step"] for entry in read_log(tmp_path)] == [2, 4, 5, 5]


def test_a_stop_rule_and_the_time_end_a_run_with_a_last_save(tmp_path):
    run = Trainer(tmp_path / "rule", Options(), stop_at=3)
    run.train()
    assert (run.done, run.validated, run.written) == (3, [2, 3], [2, 3])
    late = Trainer(tmp_path / "time", Options(), max_seconds=1e-9)
    assert late.train() == {}
    assert (late.done, late.written) == (0, [])


def test_a_killed_run_goes_on_from_its_last_save_to_the_same_weights(tmp_path):
    whole = Trainer(tmp_path / "whole", Options())
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        Trainer(tmp_path / "killed", Options(), fail_at=3).train()
    again = Trainer(tmp_path / "killed", Options())
    again.train()
    assert again.made == [2, 3, 4]
    assert torch.equal(again.model.weight, whole.model.weight)
    assert torch.equal(again.average["weight"], whole.average["weight"])


def test_a_resume_refuses_other_settings_and_may_be_declined(tmp_path):
    Trainer(tmp_path, Options()).train()
    with pytest.raises(CheckpointError, match=r"lr 0\.1, now 0\.2"):
        Trainer(tmp_path, Options(lr=0.2)).train()
    anew = Trainer(tmp_path, Options(lr=0.2, resume=False))
    anew.train()
    assert anew.made == [0, 1, 2, 3, 4]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    run = Trainer(tmp_path, Options())
    run.model.weight.data.fill_(float("inf"))
    with pytest.raises(TrainingError, match="the loss is inf at step 0; lower lr"):
        run.train()


def test_averaged_weights_are_lent_for_a_block(tmp_path):
    run = Trainer(tmp_path, Options())
    run.train()
    own = run.model.weight.detach().clone()
    with run.averaged():
        assert torch.equal(run.model.weight, run.average["weight"])
        assert not run.model.training
    assert torch.equal(run.model.weight, own)
    assert run.model.training
