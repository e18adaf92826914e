"""How far a world model's imagination is from the truth after 1 to H steps, in units that models with different encoders share.

Latents themselves cannot be compared: each model learns its own encoder, and one that encodes little is easy to predict. So the endpoint
error is measured where all models meet, in observations. The same linear probe is fitted to every model (ridge regression in closed form,
so without seed or stopping rule), from its encodings of training observations to these observations. Read through it, the latent imagined
from the first observation of a held-out window and its recorded actions is compared with the encoding of what was observed then. The unit
is the observation's variance, in which saying "nothing changes" has its error too. What encoder and probe lose of an observation is not the
dynamics' doing and is told apart (``unread``): a model that encodes nothing would be easy to predict, and is seen there. Rewards need no
probe. The error in the model's own latent space, relative to its variance, is kept as a diagnostic (``endpoint_error``).

Source: docs/design/decisions.md ("Control arms").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttcfast.data.replay import ReplaySet, Windows
from ttcfast.pwm.models.base import BaseWorldModel
from ttcfast.runtime.errors import DataError

from .endpoint import endpoint_error, latent_variance
from .simplex import simplex_distance

_CHUNK = 1024  # windows imagined at once
_CONSTANT = 1e-6  # spread below which an entry of the observations does not change: padding
# Of the latents' mean variance: directions in which true latents hardly vary (3 % of the usual spread) are read less and less, since an
# imagined latent is off them by chance. Without it such directions, which a linear map would blow up, decided the error.
_RIDGE = 1e-3


@dataclass(frozen=True)
class Scale:
    """Centre and spread of the observations, ``[O]`` float64."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, data: ReplaySet) -> Scale:
        """Over all observations of ``data``.

        Raises:
            DataError: no entry changes.
        """
        mean, std = data.observation_statistics()
        if not bool((std > _CONSTANT).any()):
            raise DataError("no entry of the observations changes in the training episodes; collect other data")
        return cls(mean, std)

    def encode(self, obs: Tensor) -> Tensor:
        """``obs [..., O]`` as float64 in units of its spread; entries that never change are left out."""
        changing = self.std > _CONSTANT
        return ((obs.double() - self.mean) / self.std)[..., changing]


@dataclass(frozen=True)
class Probe:
    """A linear map from latents to scaled observations, ``(z - centre) @ weight + offset``, float64."""

    centre: Tensor  # [L]
    weight: Tensor  # [L, O]
    offset: Tensor  # [O]

    @classmethod
    def fit(cls, latents: Tensor, targets: Tensor, *, ridge: float = _RIDGE) -> Probe:
        """Ridge regression of ``targets [N, O]`` on ``latents [N, L]``; ``ridge`` is in units of the latents' mean variance."""
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
    """Mean squared errors over windows and entries, in units of the variance of what is predicted; entry ``h - 1`` is that of step h.

    ``observation``: the endpoint error as the probe reads it. ``reward``: of the reward that the step earns. ``latent``: in the model's
    own latent space (empty where there is none). ``unread``: what encoder and probe lose of an observation. ``simplex_distance``: of the
    latents after H steps.
    """

    observation: tuple[float, ...]
    reward: tuple[float, ...]
    latent: tuple[float, ...] = ()
    unread: float = 0.0
    simplex_distance: float = 0.0


@torch.no_grad()
def fit_probe(model: BaseWorldModel, windows: Windows, scale: Scale) -> Probe:
    """The probe of ``model``, from all observations of ``windows`` of training episodes."""
    latents = model.encode(windows.obs.to(_device(model)), _task(model, windows)).cpu()
    return Probe.fit(latents.flatten(0, 1), scale.encode(windows.obs).flatten(0, 1))


def imagination_errors(model: BaseWorldModel, probe: Probe, windows: Windows, scale: Scale) -> ImaginationErrors:
    """Imagine every held-out window from its first observation with its recorded actions, and compare each step with the truth.

    Args:
        model: on any device.
        probe: of :func:`fit_probe`.
        windows: B windows of H steps.
        scale: that the probe was fitted with.
    """
    task = _task(model, windows)
    obs, act = (values.to(_device(model)) for values in windows[:2])
    latents, rewards = imagine(model, windows)
    with torch.no_grad():
        truth = probe(model.encode(obs, task).cpu())
    return ImaginationErrors(
        observation=_curve((probe(latents) - truth)[1:]),
        reward=_curve((rewards - windows.rew).double() / _spread(windows.rew)),
        latent=tuple((endpoint_error(model, obs, act, task) / latent_variance(model, obs, task)).tolist()),
        unread=float((truth - scale.encode(windows.obs)).square().mean()),
        simplex_distance=float(simplex_distance(latents[-1], model.group)),
    )


def persistence(windows: Windows, scale: Scale) -> ImaginationErrors:
    """The errors of saying that nothing changes: the first observation for all later ones, the first reward for all later ones."""
    x = scale.encode(windows.obs)
    reward = _curve((windows.rew - windows.rew[:1]).double() / _spread(windows.rew))
    # The first reward is what the copy is made of.
    return ImaginationErrors(_curve((x - x[:1])[1:]), (float("nan"), *reward[1:]))


@torch.no_grad()
def imagine(model: BaseWorldModel, windows: Windows) -> tuple[Tensor, Tensor]:
    """Latents ``[H+1, B, L]`` from the first observation on and predicted rewards ``[H, B, 1]``, on the CPU."""
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


def _task(model: BaseWorldModel, windows: Windows, part: slice = slice(None)) -> Tensor | None:
    """A model of a single task takes none."""
    return windows.task[part].to(_device(model)) if model.task_embedding is not None else None


def _device(model: BaseWorldModel) -> torch.device:
    return next(model.parameters()).device


def _curve(error: Tensor) -> tuple[float, ...]:
    """Mean square of every step of ``error [H, B, D]``."""
    return tuple(error.square().mean((1, 2)).tolist())


def _spread(values: Tensor) -> Tensor:
    return values.double().std(correction=0).clamp_min(torch.finfo(torch.float64).tiny)
