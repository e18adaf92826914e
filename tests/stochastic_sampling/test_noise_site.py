"""Noise sites of samplers, patterns of names and noise on output objects."""

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import nn

from ttcfast import StateSpec, Surrogate, TTCConfig, TTCGreedy
from ttcfast.spec import StochasticConfig
from ttcfast.stochastic_sampling import NoiseSite, enable_mc_dropout, noise_sites
from ttcfast.stochastic_sampling.dropout_wrap import edit_output

SPEC = StateSpec.fields("u")


class Flow(nn.Module):
    """A flow-matching sampler in two Euler steps."""

    def __init__(self, sigma=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.noise = nn.Conv2d(2, 1, 3, padding=1), NoiseSite(sigma)

    def forward(self, x):
        z = self.noise(x)
        for _ in range(2):
            z = z + 0.5 * self.net(torch.cat([z, x], 1))
        return x + 0.1 * z


def energy(x, candidates, **_):
    return -candidates.square().flatten(-3).sum(-1)


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_rollout_of_a_sampler_is_the_same_in_any_chunk(chunk):
    x = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))

    def rolled(**options):
        return TTCGreedy(Surrogate(Flow(), SPEC), energy, TTCConfig(branching_factor=4, seed=5, **options)).rollout(x, 2)

    torch.testing.assert_close(rolled(chunk_size=chunk), rolled())


def test_noise_is_standard_within_a_surrogate_and_zero_in_its_deterministic_step():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.noise = NoiseSite(2.0)

        def forward(self, x):
            return x + self.noise(x)

    model = Bare()
    surrogate, x = Surrogate(model, SPEC), torch.ones(1, 1, 32, 32)
    noise = surrogate.candidates(x, torch.arange(64), seed=0, step=0) - 1
    assert abs(float(noise.std()) - 2) < 0.03 and abs(float(noise.mean())) < 0.03
    assert torch.equal(surrogate.deterministic(x), x)
    still = Surrogate(model, SPEC, stochastic={"dropout": False})  # the sampler's own noise is no option
    assert torch.equal(still.candidates(x, torch.arange(64), seed=0, step=0) - 1, noise)
    torch.manual_seed(0)
    outside = model(x)
    torch.manual_seed(0)
    assert torch.equal(outside, x + 2 * torch.randn_like(x))
    assert [s.amount for s in noise_sites(model, StochasticConfig(latent_sigma=0.5, latent_at="noise"))] == [0.5]
    with pytest.raises(ValueError, match="sigma is -1"):
        NoiseSite(-1)


def blocks():
    def block():
        return nn.ModuleDict({"attention": nn.Linear(3, 3), "mlp": nn.Sequential(nn.Linear(3, 3))})

    return nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])})


def test_patterns_name_a_module_in_every_block():
    config = StochasticConfig(dropout_p=0.1, dropout_after=("blocks.*.mlp", "blocks.0.mlp"))
    assert [s.name for s in noise_sites(blocks(), config)] == ["blocks.0.mlp", "blocks.1.mlp"]
    wrapped = [s.name for s in noise_sites(nn.DataParallel(blocks()), config)]
    assert wrapped == ["module.blocks.0.mlp", "module.blocks.1.mlp"]
    model = enable_mc_dropout(blocks(), 0.1, after=["blocks.*.mlp"])
    assert [len(b["mlp"]._forward_hooks) for b in model["blocks"]] == [1, 1]
    wrong = StochasticConfig(dropout_p=0.1, dropout_after=("block.*.mlp",))
    with pytest.raises(ValueError, match=r"after names \['block\.\*\.mlp'\], .*; near names are 'blocks.1.mlp', 'blocks.0.mlp'"):
        noise_sites(blocks(), wrong)


def test_noise_is_added_to_the_first_tensor_of_an_output():
    class Pair(NamedTuple):
        first: torch.Tensor
        second: torch.Tensor

    one, two = torch.ones(1), torch.full((1,), 2.0)
    given = OrderedDict(loss=None, hidden=one, other=two)
    edited = edit_output(given, lambda t: t + 1, "it")
    assert type(edited) is OrderedDict and edited["hidden"] == 2 and edited["other"] == 2 and edited["loss"] is None
    assert given["hidden"] == 1  # the module may keep what it returned
    assert edit_output(Pair(one, two), lambda t: t + 4, "it") == Pair(torch.tensor([5.0]), two)
    with pytest.raises(ValueError, match="it returns a dict; name a module that returns a tensor"):
        edit_output({"loss": 1.0}, lambda t: t, "it")


class WithHistory:
    """A model of another kind with frames and a deterministic step."""

    history = 2

    def deterministic(self, x):
        return x[:, 0] + x[:, 1]

    def sample_next(self, x_t, seed=None, multi=False):
        assert multi and x_t.shape[1] == 2
        return self.deterministic(x_t) + torch.randn_like(x_t[:, 0])


def test_a_sampler_of_another_class_may_have_history_and_a_deterministic_step():
    x = torch.ones(2, 2, 1, 4, 4)
    one = TTCGreedy(WithHistory(), energy, TTCConfig(branching_factor=1)).rollout(x, 3)
    assert one[:, -3:, 0, 0, 0].tolist() == [[2.0, 3.0, 5.0]] * 2  # candidate 0 alone: Fibonacci's numbers
    best = TTCGreedy(WithHistory(), energy, TTCConfig(branching_factor=4)).rollout(x, 1)
    assert (energy(x, best[:, -1]) >= energy(x, one[:, 2])).all() and not torch.equal(best[:, -1], one[:, 2])

    class Wrong(WithHistory):
        def deterministic(self, x):
            return x

    with pytest.raises(ValueError, match=r"Wrong.deterministic returned torch.float32 \(2, 2, 1, 4, 4\)"):
        TTCGreedy(Wrong(), energy, TTCConfig(branching_factor=1)).rollout(x, 1)
    Wrong.history = 0
    with pytest.raises(ValueError, match=r"Wrong\.history is 0"):
        TTCGreedy(Wrong(), energy, TTCConfig(branching_factor=1))
