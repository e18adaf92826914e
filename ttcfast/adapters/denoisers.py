"""Diffusion models of diffusers as samplers whose noise a surrogate keys."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ttcfast.checks import whole
from ttcfast.stochastic_sampling.noise_site import NoiseSite

from .wrappers import Adapter, tensor_of


class _DrawnAt(TorchFunctionMode):
    """Takes the normal noise that a scheduler draws from a site."""

    def __init__(self, site: NoiseSite, like: Tensor) -> None:
        super().__init__()
        self.site, self.like = site, like

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.randn, torch.randn_like):
            with torch._C.DisableTorchFunction():
                out = self.site(self.like)
            size = args[0] if len(args) == 1 else args or (kwargs or {})["size"]
            shape = tuple(size.shape if isinstance(size, Tensor) else size)
            if shape != tuple(out.shape):
                raise ValueError(f"the scheduler draws noise of shape {shape} for samples {tuple(out.shape)}; use another scheduler")
            return out
        return func(*args, **(kwargs or {}))


class _Denoiser(Adapter):
    def __init__(self, unet: nn.Module, scheduler: Any, steps: int, channels: int | None, arguments: dict[str, Any]) -> None:
        super().__init__(unet, arguments)
        whole("steps", steps, 1)
        self.scheduler, self.steps, self.channels = scheduler, int(steps), channels
        self.noise, self.step_noise = NoiseSite(), NoiseSite()

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        scheduler = copy.deepcopy(self.scheduler)  # it counts its steps and keeps earlier outputs
        scheduler.set_timesteps(self.steps, device=x.device)
        z = self.noise(x if self.channels is None else x[:, -self.channels :])
        z = z * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
            predicted = tensor_of(self.call(torch.cat([scaled, x], 1), timestep=t, **given))
            with _DrawnAt(self.step_noise, z):
                z = scheduler.step(predicted, t, z).prev_sample
        return z


def diffusers(unet: nn.Module, scheduler: Any, *, steps: int = 20, channels: int | None = None, **arguments: Any) -> nn.Module:
    """Makes the sampler of a diffusion model of diffusers that is conditioned on the current state, for a ``Surrogate``.

    Candidates are keyed: the first noise and that of every step come from ``NoiseSite`` modules, whichever the scheduler. The
    deterministic step takes zero for them.

    Args:
        unet: Takes the sample and the current state along the channels, ``[M, C + h*C, *S]``, and ``timestep``; such as
            ``UNet2DModel(in_channels=2 * C, out_channels=C)``.
        scheduler: A scheduler with ``set_timesteps`` and ``step``, such as ``DDIMScheduler``.
        steps: Number of denoising steps, at least 1.
        channels: C, where the surrogate has a history; None takes all channels of the input.
        arguments: Keyword arguments of every call of ``unet``.
    """
    return _Denoiser(unet, scheduler, steps, channels, arguments)
