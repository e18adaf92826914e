"""Ghost norms: every microbatch's norm as by a backward of its own, and a clear refusal where that cannot be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ttcfast.esnr import ghost_layers
from ttcfast.esnr.ghost import GhostNorms

B, WIDTHS = 12, (3, 40)  # narrow: the gradients of microbatches are formed; wide: Gram matrices


class Actor(nn.Module):
    """As PWM's: Linear -> Mish -> LayerNorm, and a log_std that no input reaches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, width), nn.Mish(), nn.LayerNorm(width), nn.Linear(width, 2))
        self.log_std = nn.Parameter(torch.full((2,), -1.0))

    def forward(self, z: Tensor, noise: Tensor) -> Tensor:
        return torch.tanh(self.body(z) + self.log_std.exp() * noise)


class Dynamics(nn.Module):
    """Task embedding, LayerNorm without weight, a layer without bias; latent 5, action 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.task = nn.Embedding(4, 3, max_norm=1.0)
        plain = nn.LayerNorm(width, elementwise_affine=False)
        self.body = nn.Sequential(nn.Linear(11, width, bias=False), nn.LayerNorm(width), nn.Mish(), plain, nn.Linear(width, 5))

    def velocity(self, z: Tensor, a: Tensor, tau: float, task: Tensor) -> Tensor:
        return self.body(torch.cat([z, self.task(task), a, torch.full_like(z[..., :1], tau)], -1))

    def heun(self, z: Tensor, a: Tensor, task: Tensor, substeps: int = 2) -> Tensor:
        dt = 1 / substeps
        for k in range(substeps):
            k1 = self.velocity(z, a, k * dt, task)
            z = z + dt / 2 * (k1 + self.velocity(z + dt * k1, a, k * dt + dt, task))
        return z


def by_loop(module: nn.Module, loss_of: Callable[..., Tensor], batch: list[Tensor], M: int, axis: int = 0) -> Tensor:
    norms = []
    for chunk in zip(*(t.chunk(M, axis) for t in batch)):
        grads = torch.autograd.grad(loss_of(*chunk) / M, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
        norms.append(sum(g.double().square().sum() for g in grads if g is not None))
    return torch.stack(norms)


def check(
    module: nn.Module, loss_of: Callable[..., Tensor], batch: list[Tensor], M: int, axis: int = 0, wide: bool = False, **options
) -> None:
    for p in module.parameters():
        p.grad = None
    with GhostNorms(module, samples=batch[0].shape[axis], microbatches=M, **options) as ghost:
        loss_of(*batch).backward()
    found = ghost.squared_norms()
    rtol = 1e-10 if batch[0].dtype == torch.float64 else 1e-5
    dtype = batch[0].dtype
    if wide:  # in float32 sums that cancel leave the loop itself further from the truth than is asked for here
        module.double()
    expected = by_loop(module, loss_of, [t.double() for t in batch] if wide else batch, M, axis)
    if wide:
        module.to(dtype)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)
    grads = [p.grad for p in module.parameters()]
    for p in module.parameters():
        p.grad = None
    loss_of(*batch).backward()
    if not options.get("broadcast"):
        for g, p in zip(grads, module.parameters()):
            assert g is p.grad is None or torch.equal(g, p.grad), "not the gradient of a plain backward"


def mlp(width: int, last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width), nn.Mish(), nn.Linear(width, width), nn.Mish(), last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("M", [1, 2, 4, B])
@pytest.mark.parametrize("width", WIDTHS)
def test_one_forward_of_an_mlp(width, M, dtype):
    model = mlp(width, nn.Linear(width, 1)).to(dtype)
    check(
        model, lambda x, y: (model(x) - y).square().mean(), [torch.randn(B, 5, dtype=dtype), torch.randn(B, 1, dtype=dtype)], M, wide=True
    )


@pytest.mark.parametrize("M", [3, B])
@pytest.mark.parametrize("width", WIDTHS)
def test_weights_used_in_every_evaluation_of_a_heun_rollout(width, M):
    model = Dynamics(width)
    task = torch.randint(0, 4, (B,))

    def loss_of(z: Tensor, a: Tensor, task: Tensor) -> Tensor:
        for _ in range(2):
            z = model.heun(z, a, task)
        return z.square().mean()

    check(model, loss_of, [torch.randn(B, 5), torch.randn(B, 2), task], M)


@pytest.mark.parametrize("M", [2, B])
def test_actor_through_frozen_dynamics_with_its_log_std(M):
    actor, dynamics = Actor(16), Dynamics(16).requires_grad_(False)

    def loss_of(z: Tensor, noise: Tensor, task: Tensor) -> Tensor:
        for _ in range(3):
            z = dynamics.heun(z, actor(z.detach(), noise), task, 1)
        return -z.sum(-1).mean()

    check(actor, loss_of, [torch.randn(B, 5), torch.randn(B, 2), torch.randint(0, 4, (B,))], M, broadcast=["log_std"])


@pytest.mark.parametrize("M", [2, B])
@pytest.mark.parametrize("width", WIDTHS)
def test_sequences_batch_first_or_time_first(width, M):
    model = nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width), nn.Mish(), nn.Linear(width, 2))
    check(model, lambda x: model(x).square().mean(), [torch.randn(B, 7, 5)], M)
    encoded = nn.Sequential(nn.Linear(4, 5), model)
    check(encoded, lambda x: model(encoded(x)[..., :1].expand(-1, -1, 5)).square().mean(), [torch.randn(7, B, 4)], M, 1, batch_dim=-2)
    check(encoded, lambda x: encoded(x).mean() + model(encoded[0](x[0])).square().mean(), [torch.randn(7, B, 4)], M, 1, batch_dim=-2)


@pytest.mark.parametrize("M", [2, B])
def test_lookups_that_repeat_and_that_are_padding(M):
    table, head = nn.Embedding(5, 4, padding_idx=2), nn.Linear(4, 1)
    model = nn.ModuleList([table, head])
    index = torch.randint(0, 5, (B, 6))
    index[:, 0] = 2
    check(model, lambda i: head(table(i)).square().mean() + head(table(i[:, :1])).mean(), [index], M)


def test_layer_norm_over_several_axes():
    model = nn.Sequential(nn.LayerNorm((3, 4)), nn.Flatten(-2), nn.Linear(12, 2))
    check(model, lambda x: model(x).square().mean(), [torch.randn(B, 3, 4)], 3)
    check(model, lambda x: model(x).square().mean(), [torch.randn(B, 5, 3, 4)], 3)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("M", [3, B])
def test_parameters_that_are_frozen_count_nothing(frozen, M):
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Mish(), nn.Linear(8, 2))
    for name, p in model.named_parameters():
        p.requires_grad_(frozen not in name)
    check(model, lambda x: model(x).square().mean() + model(2 * x).mean(), [torch.randn(B, 5)], M)


def test_temporaries_are_taken_in_groups(monkeypatch):
    monkeypatch.setattr(ghost_layers, "MOST_NUMBERS", 20)
    for width in WIDTHS:
        model = mlp(width, nn.Linear(width, 1))
        check(model, lambda x, model=model: model(x).square().mean(), [torch.randn(B, 5)], 3)


def test_activations_in_place_and_checkpointing_change_nothing():
    model = nn.Sequential(nn.Linear(5, 8), nn.Mish(inplace=True), nn.Linear(8, 2))
    check(model, lambda x: model(x).square().mean(), [torch.randn(B, 5)], 3)
    for reentrant in (False, True):

        def loss_of(x: Tensor, reentrant: bool = reentrant) -> Tensor:
            return torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=reentrant).square().mean()

        with GhostNorms(model, samples=B, microbatches=3) as ghost:
            for p in model.parameters():
                p.grad = None
            x = torch.randn(B, 5)
            loss_of(x).backward()
        torch.testing.assert_close(ghost.squared_norms(), by_loop(model, lambda x: model(x).square().mean(), [x], 3), rtol=1e-5, atol=0)


def test_autocast_is_measured_to_its_precision():
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Mish(), nn.Linear(8, 2))

    def loss_of(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().mean()

    x = torch.randn(B, 5)
    with GhostNorms(model, samples=B, microbatches=3) as ghost:
        loss_of(x).backward()
    torch.testing.assert_close(ghost.squared_norms(), by_loop(model, loss_of, [x], 3), rtol=0.03, atol=0)


def test_nothing_is_left_on_the_module():
    actor = Actor(4)
    with pytest.raises(ZeroDivisionError), GhostNorms(actor, samples=2, microbatches=2, broadcast=["log_std"]):
        assert actor.log_std.shape == (2, 2)
        raise ZeroDivisionError
    assert actor.log_std is dict(actor.named_parameters())["log_std"]
    assert not any(m._forward_hooks for m in actor.modules())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("message", "module"),
    [
        (r"but not 0 \(Conv2d with weight, bias\)", nn.Sequential(nn.Conv2d(1, 1, 3), nn.Linear(2, 2))),
        (r"attention \(MultiheadAttention with in_proj_weight, in_proj_bias\)", nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})),
        (r"1 \(BatchNorm1d: samples depend on each other\)", nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))),
        (r"the module itself \(Actor with log_std\)", Actor(3)),
        (r"second \(Linear that shares a parameter with first\)", Tied()),
        (r"the module itself \(Scaled with weight, bias\)", Scaled(2, 2)),
        (r"the module itself \(Embedding with sparse=True\)", nn.Embedding(3, 2, sparse=True)),
        (r"0.parametrizations.weight \(ParametrizationList", nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))),
    ],
)
def test_layers_that_cannot_be_measured_are_named(message, module):
    with pytest.raises(ValueError, match=message) as caught:
        GhostNorms(module, samples=4, microbatches=2)
    assert "method='loop'" in str(caught.value)


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda m, x: functional.linear(m(x), m[0].weight).square().mean(),
        lambda m, x: m(x).square().mean() + m[1].weight.square().sum(),
        lambda m, x: functional.linear(x, m[0].weight).square().mean(),
        lambda m, x: (
            m(x).square().mean() + m(m(x)).square().sum() * m[0].bias.sum()
        ),  # a plain sum is one of LayerNorm's outputs: 0 but for rounding
    ],
)
def test_parameters_used_outside_their_module_are_noticed(loss_of):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with GhostNorms(model, samples=B, microbatches=3) as ghost:
        loss_of(model, torch.randn(B, 4)).backward()
    with pytest.raises(ValueError, match=r"the gradient of [01]\.(weight|bias) is not what the calls of [01] "):
        ghost.squared_norms()


def test_wrong_batch_axis_and_names():
    model = nn.Sequential(nn.Linear(4, 4))
    with (
        pytest.raises(ValueError, match=r"0 \(Linear\) gives \(5, 12, 4\), in which axis 0 is not the batch of 12"),
        GhostNorms(model, samples=12, microbatches=3),
    ):
        model(torch.randn(5, 12, 4))
    with pytest.raises(ValueError, match="samples is 10 and microbatches 3; the second must divide the first"):
        GhostNorms(model, samples=10, microbatches=3)
    with pytest.raises(ValueError, match=r"broadcast names 'log_std'; the parameters are 0.weight, 0.bias"):
        GhostNorms(model, samples=10, microbatches=2, broadcast=["log_std"])
    with pytest.raises(ValueError, match=r"broadcast names '0.bias', which belongs to a Linear"):
        GhostNorms(model, samples=10, microbatches=2, broadcast=["0.bias"])


class Sequences(nn.Module):
    """Every kind that is measured, time first: padding, a wide layer (Gram matrices), a narrow one (formed), a parameter beside them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.table, self.wide, self.norm = nn.Embedding(5, 6, padding_idx=0), nn.Linear(6, 20, bias=bias), nn.LayerNorm(20)
        self.last, self.log_scale = nn.Linear(20, 2, bias=bias), nn.Parameter(torch.zeros(2))

    def forward(self, index: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.wide(self.table(index))))) * self.log_scale.exp()


@pytest.mark.parametrize("looking", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 30])
def test_no_scale_of_gradients_or_inputs_is_out_of_range(steps, bias, looking, monkeypatch):
    if not looking:  # as on a device, where nothing is looked at and everything is scaled
        monkeypatch.setattr(ghost_layers, "_within", lambda *_: False)
    for size in (1e-12, 1.0, 1e15):
        for scale in (1e-22, 1.0, 1e21):
            model, index = Sequences(bias), torch.randint(0, 5, (steps, 8))
            with torch.no_grad():
                model.table.weight.mul_(size)

            def loss_of(index: Tensor, model: Sequences = model, scale: float = scale) -> Tensor:
                return scale * model(index).square().sum(-1).mean()

            with GhostNorms(model, samples=8, microbatches=4, batch_dim=-2, broadcast=["log_scale"]) as ghost:
                loss_of(index).backward()
            torch.testing.assert_close(ghost.squared_norms(), by_loop(model, loss_of, [index], 4, -1), rtol=1e-4, atol=0)


def test_gradients_below_the_smallest_normal_number_are_not_refused():
    model, x = mlp(8, nn.Linear(8, 2)), torch.randn(B, 5)
    with GhostNorms(model, samples=B, microbatches=3) as ghost:
        (1e-41 * model(x).square().mean()).backward()
    assert bool(ghost.squared_norms().isfinite().all())


@pytest.mark.parametrize(("mean", "deviation"), [(100.0, 1e-3), (1e3, 1e-3), (1e4, 1.0)])
def test_rows_far_from_zero_are_normalised_as_torch_does(mean, deviation):
    """Their rounding in LayerNorm, 1e-7 mean / deviation, was taken for a parameter that is used elsewhere."""
    model, x = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2)), mean + deviation * torch.randn(B, 8)

    def loss_of(x: Tensor) -> Tensor:
        return model(x).square().sum(-1).mean()

    with GhostNorms(model, samples=B, microbatches=4) as ghost:
        loss_of(x).backward()
    torch.testing.assert_close(ghost.squared_norms(), by_loop(model, loss_of, [x], 4), rtol=1e-3, atol=0)
    model.zero_grad()
    with GhostNorms(model, samples=B, microbatches=4) as ghost:
        (loss_of(x) + model[0].weight.square().sum()).backward()
    with pytest.raises(ValueError, match=r"the gradient of 0.weight is not what the calls of 0 "):
        ghost.squared_norms()


def test_nan_in_the_gradient_of_padding_counts_nothing():
    table = nn.Embedding(4, 3, padding_idx=0)
    index = torch.tensor([[0, 1], [2, 3]])
    weight = torch.where(index == 0, torch.nan, 1.0).unsqueeze(-1)
    with GhostNorms(table, samples=2, microbatches=2) as ghost:
        (table(index) * weight).sum().backward()
    assert ghost.squared_norms().tolist() == pytest.approx([3, 6])
