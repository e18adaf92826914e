"""Models of other axes, arguments and outputs in a surrogate: at most six lines each, keyed whatever the chunks."""

import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ttcfast import StateSpec, Surrogate, adapters
from ttcfast.stochastic_sampling import NoiseSite

SPEC = StateSpec.fields("vorticity", "tracer", conserved="all")


def keyed(surrogate, x, seed=3):
    """Candidates of four states at once, which must be those of each state and id alone."""
    ids = torch.arange(1, 5)
    whole = surrogate.candidates(x, ids, seed=seed, step=0)
    for n in range(len(x)):
        alone = surrogate.candidates(x[n : n + 1], ids[2:3], problem_ids=torch.tensor([n]), seed=seed, step=0)
        torch.testing.assert_close(alone[0, 0], whole[n, 2], rtol=1e-4, atol=1e-5)
    assert (whole[:, 0] - whole[:, 1]).abs().amax() > 1e-4
    return whole


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class LastChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.3), nn.Linear(8, 2))

    def forward(self, x):  # [M, H, W, C]
        return {"pred": self.mlp(x)}


def test_channels_last_of_a_dict():
    torch.manual_seed(0)
    model = LastChannels()
    surrogate, x = Surrogate(adapters.channels_last(model), SPEC), states(4, 2, 5, 6)
    keyed(surrogate, x)
    torch.testing.assert_close(surrogate.deterministic(x), model.eval()(x.movedim(1, -1))["pred"].movedim(-1, 1))


class TimeFirst(nn.Module):
    """The axes of Multiple Physics Pretraining's AViT: ``t b c h w``, folded to ``(t b)`` inside."""

    def __init__(self):
        super().__init__()
        self.embed, self.drop, self.out = nn.Conv2d(2, 6, 1), nn.Dropout(0.3), nn.Conv2d(6, 2, 1)

    def forward(self, x, state_labels=None):
        t, b = x.shape[:2]
        z = self.drop(self.embed(x.flatten(0, 1))).unflatten(0, (t, b)).cumsum(0)
        return self.out(z[-1]) + state_labels.sum()


def test_time_first_folded_with_the_states():
    torch.manual_seed(0)
    labels = torch.tensor([0.5])
    model = TimeFirst()
    surrogate = Surrogate(adapters.time_first(model, history=4, state_labels=labels), SPEC, history=4)
    x = states(4, 4, 2, 5, 6)
    keyed(surrogate, x)
    torch.testing.assert_close(surrogate.deterministic(x), model.eval()(x.transpose(0, 1), labels))


class Output(OrderedDict):
    """Like transformers' ModelOutput: entries by key and attribute."""


class ScotLike(nn.Module):
    """The interface of Poseidon's ScOT: ``time`` per row, an output object, the input added with ``learn_residual``."""

    def __init__(self):
        super().__init__()
        self.embed, self.encoder, self.head = nn.Conv2d(2, 6, 1), nn.Identity(), nn.Conv2d(6, 2, 1)

    def forward(self, pixel_values=None, time=None, labels=None):
        hidden = self.encoder(Output(last_hidden_state=self.embed(pixel_values), hidden_states=None))["last_hidden_state"]
        return Output(output=pixel_values + time[:, None, None, None] * self.head(hidden), hidden_states=(hidden,))


def test_scot_with_its_lead_time_and_noise_on_an_output_object():
    torch.manual_seed(0)
    model, x = ScotLike(), states(4, 2, 5, 6)
    noise = {"dropout": False, "latent_sigma": 0.5, "latent_at": "encoder"}
    surrogate = Surrogate(adapters.scot(model, lead_time=0.25), SPEC, stochastic=noise)
    keyed(surrogate, x)
    torch.testing.assert_close(surrogate.deterministic(x), model(x, torch.full((4,), 0.25))["output"])
    timed = Surrogate(adapters.scot(model), SPEC, stochastic=noise, inputs=lambda c: {"time": 0.1 * (c.problem_ids + 1.0)})
    torch.testing.assert_close(timed.deterministic(x), model(x, 0.1 * torch.arange(1.0, 5.0))["output"])
    with pytest.raises(ImportError, match="needs Poseidon's package scOT"):
        adapters.scot("camlab-ethz/Poseidon-T")
    with pytest.raises(ValueError, match="has no argument time"):
        adapters.scot(nn.Identity())


def test_outputs_by_field():
    @dataclass
    class Two:
        loss: torch.Tensor
        state: torch.Tensor

    class Model(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.make = make

        def forward(self, x):
            return self.make(x)

    x = states(3, 2, 4, 4)
    two = adapters.hf(Model(lambda x: Two(x.sum(), 2 * x)), "state")
    assert torch.equal(two(x), 2 * x)
    assert torch.equal(adapters.hf(Model(lambda x: (2 * x, x)))(x), 2 * x)
    assert torch.equal(adapters.hf(Model(lambda x: (2 * x, x)), 1)(x), x)
    with pytest.raises(ValueError, match=r"field is None and the model returned a Two with 'loss' \(\), 'state' \(3, 2, 4, 4\)"):
        adapters.hf(Model(lambda x: Two(x.sum(), 2 * x)))(x)


class Refiner(nn.Module):
    """PDE-Refiner: a first guess, then repeated denoising of a noised guess."""

    def __init__(self):
        super().__init__()
        self.net, self.noise = nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), NoiseSite()

    def forward(self, x):
        u = self.net(torch.cat([torch.zeros_like(x), x], 1))
        for sigma in (0.5, 0.1):
            u = u + sigma * (noise := self.noise(u)) - 0.1 * self.net(torch.cat([u + sigma * noise, x], 1))
        return u


def test_a_refiner_draws_at_its_noise_site():
    torch.manual_seed(0)
    model, x = Refiner(), states(4, 2, 6, 6)
    surrogate = Surrogate(model, SPEC)
    keyed(surrogate, x)
    assert torch.equal(surrogate.deterministic(x), surrogate.deterministic(x))
    assert not model.noise.keyed and not torch.equal(model(x), model(x))  # outside it draws from torch


def test_the_adapters_import_no_other_package():
    code = "import sys, ttcfast.adapters as a\nassert len(a.__all__) == 8\n"
    code += "assert not {'neuralop', 'the_well', 'transformers', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_scripted_model_draws_at_a_site_around_it():
    class Around(nn.Module):
        def __init__(self, scripted):
            super().__init__()
            self.scripted, self.noise = scripted, NoiseSite(0.1)

        def forward(self, x):
            return self.scripted(x + self.noise(x)) + self.noise(x)

    torch.manual_seed(0)
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(nn.Conv2d(2, 2, 3, padding=1))
    keyed(Surrogate(Around(scripted), SPEC), states(4, 2, 6, 6))
