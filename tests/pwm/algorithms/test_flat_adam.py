"""FlatAdam against torch's Adam and clipping, and what it does when modules move."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ttcfast.pwm.algorithms.flat_adam import FlatAdam


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def gradients(net: nn.Module, seed: int) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return list(torch.autograd.grad(net(torch.randn(7, 3, generator=draws)).square().sum(), list(net.parameters())))


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_is_adam_after_clipping(clip):
    ours, plain = module(), module()
    flat, adam = FlatAdam(ours.parameters(), 0.01, (0.7, 0.95)), torch.optim.Adam(plain.parameters(), 0.01, betas=(0.7, 0.95))
    for step in range(5):
        norm = flat.collect(gradients(ours, step), clip)
        flat.step()
        for p, g in zip(plain.parameters(), gradients(plain, step)):
            p.grad = g
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(plain.parameters(), clip))
        adam.step()
        for a, b in zip(ours.parameters(), plain.parameters()):
            torch.testing.assert_close(a, b)


def test_a_missing_gradient_is_zero():
    net = module()
    before, flat = copy.deepcopy(net), FlatAdam(net.parameters(), 0.1, (0.7, 0.95))
    found = gradients(net, 0)
    flat.collect([None, *found[1:]], 1.0)
    flat.step()
    assert torch.equal(net[0].weight, before[0].weight) and not torch.equal(net[0].bias, before[0].bias)


def test_parameters_that_got_other_memory_are_followed_with_their_moments():
    one, two = module(), module()
    moved, kept = FlatAdam(one.parameters(), 0.01, (0.7, 0.95)), FlatAdam(two.parameters(), 0.01, (0.7, 0.95))
    for step in range(4):
        if step == 2:
            nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(one.parameters()).detach().clone(), one.parameters())
        for net, flat in ((one, moved), (two, kept)):
            flat.collect(gradients(net, step), 1.0)
            flat.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_one_parameter_that_got_other_memory_is_followed():
    net, plain = module(), module()
    flat, adam = FlatAdam(net.parameters(), 0.01, (0.7, 0.95)), torch.optim.Adam(plain.parameters(), 0.01, betas=(0.7, 0.95))
    for one in (net, plain):
        one[2].bias.data = torch.ones(2)
    flat.collect(gradients(net, 0), 1e6)
    flat.step()
    for p, g in zip(plain.parameters(), gradients(plain, 0)):
        p.grad = g
    adam.step()
    torch.testing.assert_close(net[2].bias, plain[2].bias)


def test_its_state_goes_on_with_the_same_bits():
    one, two = module(), module()
    first, second = FlatAdam(one.parameters(), 0.01, (0.7, 0.95)), FlatAdam(two.parameters(), 0.5, (0.7, 0.95))
    first.collect(gradients(one, 0), 1.0)
    first.step()
    two.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for net, flat in ((one, first), (two, second)):
        flat.collect(gradients(net, 1), 1.0)
        flat.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
