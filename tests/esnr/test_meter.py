"""ESNRMeter: the step it measures is the step that would have been taken, and what it says is ESNR."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ttcfast.pwm.utils.metrics import ESNR, ESNRMeter, esnr

ROOT = Path(__file__).resolve().parents[2]


def actor(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.Mish(), nn.LayerNorm(20), nn.Linear(20, 3)).to(dtype)


def loss(model: nn.Module) -> Callable[..., Tensor]:
    return lambda x, y: (model(x) - y).square().sum(-1).mean()


def noisy_loss(model: nn.Module) -> Callable[..., Tensor]:
    """As an actor's: draws noise for its actions and drops units."""
    return lambda x, y: (functional.dropout(model(x), 0.2) + 0.1 * torch.randn_like(y) - y).square().mean()


def data(samples: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 6, dtype=dtype), 2 + torch.randn(samples, 3, dtype=dtype)


def by_definition(model: nn.Module, loss_of: Callable[..., Tensor], batch: tuple[Tensor, ...], M: int) -> ESNR:
    grads = [torch.autograd.grad(loss_of(*chunk), list(model.parameters())) for chunk in zip(*(t.chunk(M) for t in batch))]
    return esnr(grads, microbatch_size=batch[0].shape[0] // M)


def train(M: int, measured: bool, set_to_none: bool) -> tuple[list[Tensor], Tensor]:
    """Four steps of Adam with clipping; the parameters and the random state afterwards."""
    torch.manual_seed(5)
    model = actor()
    optimizer, meter, batch = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=1e-3), ESNRMeter(model, M), data(24)
    for _ in range(4):
        optimizer.zero_grad(set_to_none=set_to_none)
        if measured:
            meter.measure(noisy_loss(model), *batch)
        else:
            for chunk in zip(*(t.chunk(M) for t in batch)):
                (noisy_loss(model)(*chunk) / M).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], torch.get_rng_state()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("M", [2, 3, 8])
def test_measured_run_is_bitwise_the_same_run_in_chunks_that_does_not_measure(M, set_to_none):
    plain, measured = train(M, False, set_to_none), train(M, True, set_to_none)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], measured[0]))
    assert torch.equal(plain[1], measured[1])


def test_a_16_bit_model_is_accumulated_as_autograd_does():
    model, M, (x, y) = actor(torch.bfloat16), 4, data(8, torch.bfloat16)
    for chunk in zip(x.chunk(M), y.chunk(M)):
        (loss(model)(*chunk) / M).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ESNRMeter(model, M).measure(loss(model), x, y)
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("method", ["loop", "ghost"])
@pytest.mark.parametrize("M", [2, 5, 20])
def test_says_what_the_definition_says(M, method, dtype, tolerance):
    model, batch = actor(dtype), data(20, dtype)
    expected = by_definition(model, loss(model), batch, M)
    found = ESNRMeter(model, M, method=method).measure(loss(model), *batch)
    assert found.esnr == pytest.approx(expected, rel=tolerance)
    torch.testing.assert_close(found.losses.mean(), loss(model)(*batch).detach())
    assert found.losses.shape == ((M,) if method == "loop" else (1,)) and not found.losses.requires_grad
    gradient = torch.autograd.grad(loss(model)(*batch), list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(gradient))


def test_ghost_leaves_the_gradient_of_the_plain_backward_to_the_bit():
    model, batch = actor(), data(20)
    loss(model)(*batch).backward()
    plain = [p.grad for p in model.parameters()]
    model.zero_grad()
    found = ESNRMeter(model, None, method="ghost").measure(loss(model), *batch)
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters()))
    assert found.esnr.M == 20 and found.esnr == pytest.approx(by_definition(model, loss(model), batch, 20), rel=1e-5)


def test_ghost_verifies_the_first_and_every_hundredth_measurement(monkeypatch):
    monkeypatch.setattr("ttcfast.esnr.meter.VERIFY_EVERY", 3)
    model, batch = nn.Sequential(nn.Linear(6, 3)), data(4)
    meter, penalty = ESNRMeter(model, 2, method="ghost"), 0.0
    outcomes = []
    for _ in range(5):
        model.zero_grad()
        try:
            meter.measure(lambda x, y: loss(model)(x, y) + penalty * model[0].weight.square().sum(), *batch)  # noqa: B023
            outcomes.append("measured")
        except ValueError as error:
            assert "penalised in the loss" in str(error)
            outcomes.append("refused")
        penalty = 1.0
    assert outcomes == ["measured", "measured", "measured", "refused", "refused"]


def test_batches_along_another_axis_and_arguments_that_are_none():
    model, (x, y) = actor(), data(12)
    expected = ESNRMeter(model, 3).measure(loss(model), x, y).esnr
    for method, options in (("loop", {}), ("ghost", {"activation_batch_dim": -2})):
        model.zero_grad()
        meter = ESNRMeter(model, 3, method=method, batch_dim=1, **options)
        found = meter.measure(lambda a, task, b: loss(model)(a, b), x.unsqueeze(0), None, y.unsqueeze(0))
        assert found.esnr == pytest.approx(expected, rel=1e-5)


def test_a_parameter_that_some_microbatches_do_not_reach():
    model, extra = actor(torch.float64), nn.Linear(6, 3).double()
    both, (x, y) = nn.ModuleList([model, extra, nn.Linear(1, 1).double()]), data(8, torch.float64)
    x[:2, 0], x[2:, 0] = -1, 1

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return loss(model)(x, y) + (extra(x).mean() if bool(x[0, 0] > 0) else 0)

    grads = []
    for chunk in zip(x.chunk(4), y.chunk(4)):
        found = torch.autograd.grad(loss_of(*chunk), list(both.parameters()), allow_unused=True)
        grads.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, both.parameters())])
    assert ESNRMeter(both, 4).measure(loss_of, x, y).esnr == pytest.approx(esnr(grads, microbatch_size=2), rel=1e-10)
    assert both[2].weight.grad is None and extra.weight.grad is not None


def test_smoothed_averages_signal_and_noise_before_the_ratio_and_skips_what_is_not_finite():
    model = actor(torch.float64)
    meter = ESNRMeter(model, 4, decay=0.5)
    found = []
    for _ in range(3):
        model.zero_grad()
        found.append(meter.measure(loss(model), *data(8, torch.float64)).esnr)
    model.zero_grad()
    x, y = data(8, torch.float64)
    assert math.isnan(meter.measure(loss(model), x * math.nan, y).esnr.unbiased)
    weights = [1 / 7, 2 / 7, 4 / 7]
    trace = sum(w * f.trace_var for w, f in zip(weights, found))
    signal = sum(w * f.unbiased * f.trace_var for w, f in zip(weights, found))
    smoothed = meter.smoothed()
    assert smoothed.trace_var == pytest.approx(trace) and smoothed.unbiased == pytest.approx(signal / trace)
    assert smoothed.noise_scale == pytest.approx(2 * trace / signal) or (signal <= 0 and math.isnan(smoothed.noise_scale))
    other = ESNRMeter(model, 4, decay=0.5)
    with pytest.raises(ValueError, match="nothing finite has been measured yet"):
        other.smoothed()
    other.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert other.smoothed() == smoothed


PROCESS = """
import json, sys
import torch
from torch import distributed, nn
sys.path.insert(0, {root!r})
from tests.esnr.test_meter import actor, data, loss
from ttcfast.pwm.utils.metrics import ESNRMeter

rank, out = int(sys.argv[1]), {out!r}
distributed.init_process_group("gloo", init_method="file://" + out + "/store", rank=rank, world_size=2)
results = {{}}
for dtype in (torch.float32, torch.float64):
    for method in ("loop", "ghost"):
        torch.manual_seed(7)
        model, batch = actor(dtype), data(12, dtype)
        part = [t.chunk(2)[rank] for t in batch]
        found = ESNRMeter(model, 2, method=method, group=distributed.group.WORLD).measure(loss(model), *part)
        results[f"{{dtype}} {{method}}"] = [*found.esnr], [p.grad.tolist() for p in model.parameters()]
uneven, (x, y) = nn.ModuleList([actor(), nn.Linear(6, 3)]), data(4)
ESNRMeter(uneven, 2, group=distributed.group.WORLD).measure(lambda x, y: loss(uneven[rank])(x, y), x, y)
results["reached"] = [p.grad is not None for p in uneven.parameters()]
model = actor()
try:
    ESNRMeter(model, 2 + 2 * rank, group=distributed.group.WORLD).measure(loss(model), *data(4))
except ValueError as error:
    results["error"] = str(error)
json.dump(results, open(f"{{out}}/{{rank}}.json", "w"))
distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_give_the_value_and_the_gradient_of_one(tmp_path):
    code = PROCESS.format(root=str(ROOT), out=str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    commands = [[sys.executable, "-c", code, str(rank)] for rank in (0, 1)]
    runs = [subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [run.communicate(timeout=120)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], errors
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert all("different numbers of microbatches" in found.pop("error") for found in results)
    assert results[0] == results[1]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        for method in ("loop", "ghost"):
            torch.manual_seed(7)
            model, batch = actor(dtype), data(12, dtype)
            one = ESNRMeter(model, 4, method=method).measure(loss(model), *batch)
            found, grads = results[0][f"{dtype} {method}"]
            assert ESNR(*found) == pytest.approx(one.esnr, rel=tolerance)
            for a, p in zip(grads, model.parameters()):
                torch.testing.assert_close(torch.tensor(a, dtype=dtype), p.grad, rtol=tolerance, atol=tolerance * 10)
    assert all(results[0]["reached"]), "a parameter that only the other process reached has no gradient here"


MODEL, X = nn.Linear(6, 3), torch.randn(8, 6)


def mean(x: Tensor) -> Tensor:
    return MODEL(x).mean()


def followed(**options) -> nn.Module:
    return nn.Sequential(MODEL, nn.Linear(3, 3, **options))


def with_gradient() -> nn.Module:
    model = nn.Linear(6, 3)
    model(X).sum().backward()
    return model


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("M is 1; ESNR needs at least 2 microbatches", lambda: ESNRMeter(MODEL, 1)),
        ("M is None, which is one microbatch per sample and needs method='ghost'", lambda: ESNRMeter(MODEL, None)),
        ("method is 'vmap'; it must be one of 'loop', 'ghost'", lambda: ESNRMeter(MODEL, 2, method="vmap")),
        ("decay is 1; it must be in", lambda: ESNRMeter(MODEL, 2, decay=1)),
        ("the batch has 8 samples and M is 3; M must divide it", lambda: ESNRMeter(MODEL, 3).measure(mean, X)),
        ("the batch has 1 samples and M is None", lambda: ESNRMeter(MODEL, None, method="ghost").measure(mean, X[:1])),
        ("give at least one tensor", lambda: ESNRMeter(MODEL, 2).measure(mean)),
        ("all of one size along axis 0", lambda: ESNRMeter(MODEL, 2).measure(mean, X, X[:4])),
        ("loss_of returned a tensor of shape", lambda: ESNRMeter(MODEL, 2).measure(MODEL, X)),
        ("loss_of returned a tensor of shape .*requires_grad=False", lambda: ESNRMeter(MODEL, 2).measure(lambda x: x.mean(), X)),
        ("loss_of returned 0.0", lambda: ESNRMeter(MODEL, 2).measure(lambda x: 0.0, X)),
        ("the loss reached no parameter of module", lambda: ESNRMeter(nn.Linear(1, 1), 2).measure(mean, X)),
        ("the loss reached no parameter of module", lambda: ESNRMeter(nn.Linear(1, 1), 2, method="ghost").measure(mean, X)),
        ("module has no parameter that requires grad", lambda: ESNRMeter(nn.Mish(), 2).measure(mean, X)),
        (
            "1.weight is torch.float64 on cpu and 0.weight torch.float32",
            lambda: ESNRMeter(followed(dtype=torch.float64), 2).measure(mean, X),
        ),
        ("1.weight is torch.float32 on meta and 0.weight", lambda: ESNRMeter(followed(device="meta"), 2).measure(mean, X)),
        ("the parameters have gradients already; call zero_grad", lambda: ESNRMeter(with_gradient(), 2).measure(mean, X)),
        (r"not the module itself \(Conv2d with weight, bias\)", lambda: ESNRMeter(nn.Conv2d(6, 1, 1), 2, method="ghost").measure(mean, X)),
    ],
)
def test_wrong_input_gives_one_clear_line(message, call):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
