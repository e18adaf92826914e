"""World models under torch's transforms: forward mode, torch.func, ensembles over stacked parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from tests.pwm.small_models import batch, small, stirred
from ttcfast.pwm.algorithms import PWM, FlowMatchingDynamicsLoss, MLPDynamicsLoss
from ttcfast.pwm.models import BaseWorldModel, FlowWorldModel, MLPWorldModel, ResidualWorldModel

KINDS: dict[str, Callable[[], BaseWorldModel]] = {
    "flow": lambda: small(FlowWorldModel),
    "flow, plain loop": lambda: small(FlowWorldModel, fused=False),
    "mlp": lambda: small(MLPWorldModel),
    "residual": lambda: small(ResidualWorldModel),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> BaseWorldModel:
    return stirred(KINDS[request.param]()).double()


def functions(model: BaseWorldModel) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {
        "next": model.next,
        "reward": model.reward,
        "step": lambda z, a: model.step(z, a)[1],
        "encode": lambda z, a: model.encode(z[..., :5]),
    }


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


def test_forward_mode_agrees_with_finite_differences_and_reverse_mode(model):
    z, a = batch(3, dtype=torch.float64)
    dz, da, h = torch.randn_like(z), torch.randn_like(a), 1e-6
    for name, f in functions(model).items():
        value, along = jvp(f, (z, a), (dz, da))
        close(value, f(z, a))
        close(along, (f(z + h * dz, a + h * da) - f(z - h * dz, a - h * da)) / (2 * h), 1e-6)
        if name == "next":
            for by_columns, by_rows in zip(jacfwd(f, (0, 1))(z, a), jacrev(f, (0, 1))(z, a)):
                close(by_columns, by_rows)


def test_hessians_are_those_of_a_gradient_of_the_gradient(model):
    z, a = batch(1, dtype=torch.float64)

    def objective(a: Tensor) -> Tensor:
        return model.next(z, a).square().sum()

    close(hessian(objective)(a), torch.autograd.functional.hessian(objective, a))


def test_vmap_over_states_is_the_batch(model):
    z, a = batch(4, dtype=torch.float64)
    for f in functions(model).values():
        close(vmap(f)(z, a), f(z, a))


class Next(nn.Module):
    """The dynamics as a module's forward, as ``functional_call`` wants them."""

    def __init__(self, model: BaseWorldModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, a: Tensor) -> Tensor:
        return self.model.next(z, a)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_is_its_members(kind):
    members = [Next(stirred(KINDS[kind]()).double()) for _ in range(3)]
    parameters, _ = stack_module_state(members)
    z, a = batch(2, dtype=torch.float64)

    def predict(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(members[0], parameters, (z, a))

    close(vmap(predict)(parameters), torch.stack([member(z, a) for member in members]))
    found = vmap(grad(lambda p: predict(p).square().sum()))({name: p.detach() for name, p in parameters.items()})
    for i, member in enumerate(members):
        member(z, a).square().sum().backward()
        for name, p in member.named_parameters():
            if p.grad is not None:
                close(found[name][i], p.grad)


def test_velocities_of_single_latents_and_times():
    model = stirred(small(FlowWorldModel)).double()
    z, a = batch(4, dtype=torch.float64)
    tau = torch.rand(4, dtype=torch.float64)
    expected = model.velocity(z, a, tau)
    close(vmap(model.velocity)(z, a, tau), expected)
    for row in range(4):
        close(model.velocity(z[row], a[row], tau[row]), expected[row])
        close(model.velocity(z[row], a[row], float(tau[row])), expected[row])


class Loss(nn.Module):
    """The world model's loss as a module's forward; its random times are the same at every call."""

    def __init__(self, model: BaseWorldModel) -> None:
        super().__init__()
        self.model, self.algorithm = (
            model,
            PWM(model, FlowMatchingDynamicsLoss() if isinstance(model, FlowWorldModel) else MLPDynamicsLoss()),
        )

    def forward(self, *data: Tensor) -> Tensor:
        torch.manual_seed(0)
        return self.algorithm.compute_wm_loss(*data).total


def test_derivatives_of_the_loss_stop_at_the_target_in_both_modes(model):
    """Targets have no gradient, so a forward-mode derivative must not see them either (torch.no_grad would not hide them from it)."""
    loss = Loss(model)
    parameters = {name: p.detach() for name, p in loss.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    data = torch.randn(4, 6, 5).double(), torch.rand(3, 6, 3).double(), torch.randn(3, 6, 1).double()

    def value(parameters: dict[str, Tensor], *data: Tensor) -> Tensor:
        return functional_call(loss, parameters, data)

    gradient = grad(value)(parameters, *data)
    along = jvp(lambda p: value(p, *data), (parameters,), (tangents,))[1]
    close(along, sum((gradient[name] * tangents[name]).sum() for name in parameters))
    loss(*data).backward()
    for name, p in loss.named_parameters():
        close(gradient[name], torch.zeros_like(p) if p.grad is None else p.grad)


def test_gradients_of_microbatches_by_vmap_are_those_of_the_microbatches():
    loss = Loss(stirred(small(MLPWorldModel)).double())
    parameters = {name: p.detach() for name, p in loss.named_parameters()}
    data = torch.randn(4, 6, 5).double(), torch.rand(3, 6, 3).double(), torch.randn(3, 6, 1).double()
    chunks = [t.unflatten(1, (2, 3)) for t in data]
    found = vmap(grad(lambda p, *chunk: functional_call(loss, p, chunk)), (None, 1, 1, 1), randomness="different")(parameters, *chunks)
    for i in range(2):
        loss.zero_grad()
        loss(*(chunk[:, i] for chunk in chunks)).backward()
        for name, p in loss.named_parameters():
            close(found[name][i], p.grad)
