"""Errors of a world model's imagination after 1 to H steps, in units that models with different encoders share.

Latents cannot be compared directly: each model learns its own encoder, and one that encodes little is easy to predict. The endpoint error
is therefore measured in observations. A linear probe (ridge regression in closed form, so without random seed or stopping rule) is fitted
to every model from its encodings of training observations to these observations. Read through the probe, the latent imagined from the
first observation of a held-out window under its recorded actions is compared with the encoding of what was observed. The unit is the
variance of the observations. What encoder and probe lose of an observation is not the fault of the dynamics and is reported separately
(``unread``), which exposes a model that encodes nothing. Rewards need no probe. The error in the model's own latent space, relative to its
variance, is kept as a diagnostic (``latent``).

Source: docs/design/decisions.md ("Control arms").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttcfast.data.replay import ReplaySet, Windows
from ttcfast.pwm.models.base import CONSTANT, BaseWorldModel
from ttcfast.pwm.models.layers import simplex_distance
from ttcfast.runtime.errors import DataError

_CHUNK = 1024  # windows imagined at once
# Ridge in units of the latents' mean variance. It damps directions in which true latents hardly vary (3 % of the usual spread), off which
# imagined latents drift by chance; amplified by the linear map, such directions would otherwise decide the error.
_RIDGE = 1e-3


@dataclass(frozen=True)
class Scale:
    """Centre and spread of the observations, ``[O]`` float64."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, data: ReplaySet) -> Scale:
        """Return the scale of all observations of ``data``.

        Raises:
            DataError: No entry of the observations changes.
        """
        mean, std = data.observation_statistics()
        if not bool((std > CONSTANT).any()):
            raise DataError("no entry of the observations changes in the training episodes; collect other data")
        return cls(mean, std)

    def encode(self, obs: Tensor) -> Tensor:
        """Return ``obs [..., O]`` centred and in units of its spread, float64, without entries that never change."""
        changing = self.std > CONSTANT
        return ((obs.double() - self.mean) / self.std)[..., changing]


@dataclass(frozen=True)
class Probe:
    """A linear map from latents to scaled observations, ``(z - centre) @ weight + offset``, float64."""

    centre: Tensor  # [L]
    weight: Tensor  # [L, O]
    offset: Tensor  # [O]

    @classmethod
    def fit(cls, latents: Tensor, targets: Tensor, *, ridge: float = _RIDGE) -> Probe:
        """Fit ``targets [N, O]`` to ``latents [N, L]`` by ridge regression; ``ridge`` is in units of the latents' mean variance."""
        z, x = latents.double(), targets.double()
        centre, offset = z.mean(0), x.mean(0)
        z, x = z - centre, x - offset
        gram = z.T @ z
        penalty = ridge * gram.diagonal().mean() + torch.finfo(torch.float64).tiny
        weight = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=torch.float64), z.T @ x)
        return cls(centre, weight, offset)

    def __call__(self, z: Tensor) -> Tensor:
        return (z.double() - self.centre) @ self.weight + self.offset


@dataclass(frozen=True)
class ImaginationErrors:
    """Mean squared errors over windows and entries, in units of the variance of what is predicted; entry ``h - 1`` belongs to step h.

    Attributes:
        observation: Endpoint error read through the probe.
        reward: Error of the reward that the step earns.
        latent: Error in the model's own latent space, empty if there is none.
        unread: What encoder and probe lose of an observation.
        simplex_distance: Distance of the latents after H steps from the simplices.
    """

    observation: tuple[float, ...]
    reward: tuple[float, ...]
    latent: tuple[float, ...] = ()
    unread: float = 0.0
    simplex_distance: float = 0.0


def fit_probe(model: BaseWorldModel, windows: Windows, scale: Scale) -> Probe:
    """Fit the probe of ``model`` to all observations of ``windows`` of training episodes."""
    return Probe.fit(_encodings(model, windows).flatten(0, 1), scale.encode(windows.obs).flatten(0, 1))


def imagination_errors(model: BaseWorldModel, probe: Probe, windows: Windows, scale: Scale) -> ImaginationErrors:
    """Imagine every held-out window from its first observation with its recorded actions, and compare each step with the truth.

    Args:
        model: World model on any device.
        probe: Probe from :func:`fit_probe`.
        windows: B held-out windows of H steps.
        scale: Scale with which the probe was fitted.
    """
    latents, rewards = imagine(model, windows)
    encoded = _encodings(model, windows)
    truth, variance = probe(encoded), encoded.flatten(0, -2).var(0, correction=0).mean()
    of_latents = torch.stack([(z - target).square().mean() for z, target in zip(latents[1:], encoded[1:])])
    return ImaginationErrors(
        observation=_curve((probe(latents) - truth)[1:]),
        reward=_curve((rewards - windows.rew).double() / _spread(windows.rew)),
        latent=tuple((of_latents / variance).tolist()),
        unread=float((truth - scale.encode(windows.obs)).square().mean()),
        simplex_distance=float(simplex_distance(latents[-1], model.group)),
    )


def persistence(windows: Windows, scale: Scale) -> ImaginationErrors:
    """Return the errors of predicting no change, that is the first observation and the first reward for all later ones."""
    x = scale.encode(windows.obs)
    reward = _curve((windows.rew - windows.rew[:1]).double() / _spread(windows.rew))
    # There is no reward before the first.
    return ImaginationErrors(_curve((x - x[:1])[1:]), (float("nan"), *reward[1:]))


@torch.no_grad()
def imagine(model: BaseWorldModel, windows: Windows) -> tuple[Tensor, Tensor]:
    """Return latents ``[H+1, B, L]`` from the first observation on and predicted rewards ``[H, B, 1]``, on the CPU."""
    device, pieces = _device(model), []
    for start in range(0, windows.act.shape[1], _CHUNK):
        part = slice(start, start + _CHUNK)
        task = _task(model, windows, part)
        latents, rewards = [model.encode(windows.obs[0, part].to(device), task)], []
        for a in windows.act[:, part].to(device):
            z, r = model.step(latents[-1], a, task)
            latents.append(z)
            rewards.append(r)
        pieces.append((torch.stack(latents).cpu(), torch.stack(rewards).cpu()))
    return torch.cat([piece[0] for piece in pieces], 1), torch.cat([piece[1] for piece in pieces], 1)


@torch.no_grad()
def _encodings(model: BaseWorldModel, windows: Windows) -> Tensor:
    """Return the encodings of all observations, ``[H+1, B, L]``, on the CPU."""
    return model.encode(windows.obs.to(_device(model)), _task(model, windows)).cpu()


def _task(model: BaseWorldModel, windows: Windows, part: slice = slice(None)) -> Tensor | None:
    """Return the tasks of ``windows``, None for a model of a single task."""
    return windows.task[part].to(_device(model)) if model.task_embedding is not None else None


def _device(model: BaseWorldModel) -> torch.device:
    return next(model.parameters()).device


def _curve(error: Tensor) -> tuple[float, ...]:
    """Return the mean square of every step of ``error [H, B, D]``."""
    return tuple(error.square().mean((1, 2)).tolist())


def _spread(values: Tensor) -> Tensor:
    return values.double().std(correction=0).clamp_min(torch.finfo(torch.float64).tiny)
