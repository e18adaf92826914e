"""A cart-pole in closed form, with the constants and the reward of dm_control's cartpole-swingup: a world model without error."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

UNITS = torch.tensor([1.0, 1.0, 1.0, 3.0, 5.0])  # of x, cos, sin, velocity, angular velocity
CART, POLE, HALF, GRAVITY, STEP, FRICTION, RAIL = 1.0, 0.1, 0.5, 9.81, 0.01, 5e-4, 1.8


class CartPole(nn.Module):
    """Latents are observations over ``UNITS``; one step is two of the simulator's, semi-implicit Euler of 0.01 s each."""

    latent_dim, action_dim = 5, 1

    def next(self, z: Tensor, a: Tensor, task: None = None) -> Tensor:
        x, cosine, sine, v, w = (z * UNITS.to(z)).unbind(-1)
        angle, force, inertia = torch.atan2(sine, cosine), 10 * a[..., 0], POLE * HALF**2 * 4 / 3
        arm = POLE * HALF
        for _ in range(2):
            cosine, sine = angle.cos(), angle.sin()
            on_cart, on_pole = force + arm * w * w * sine - FRICTION * v, GRAVITY * arm * sine
            determinant = (CART + POLE) * inertia - (arm * cosine) ** 2
            v = v + STEP * (inertia * on_cart - arm * cosine * on_pole) / determinant
            w = w + STEP * ((CART + POLE) * on_pole - arm * cosine * on_cart) / determinant
            x, angle = x + STEP * v, angle + STEP * w
            v = torch.where(x.abs() > RAIL, v * 0, v)
            x = x.clamp(-RAIL, RAIL)
        return torch.stack([x, angle.cos(), angle.sin(), v, w], -1) / UNITS.to(z)

    def reward(self, z: Tensor, a: Tensor, task: None = None) -> Tensor:
        x, cosine, _, _, w = (z * UNITS.to(z)).unbind(-1)
        near = [(1 + torch.exp(-math.log(10) * (value / margin) ** 2)) / 2 for value, margin in ((x, 2.0), (w, 5.0))]
        return (2 * (cosine + 1) / 2 * near[0] * near[1] * (5 - a[..., 0] ** 2) / 5).unsqueeze(-1)

    def encode(self, obs: Tensor, task: None = None) -> Tensor:
        return obs

    def decode_reward(self, head: Tensor) -> Tensor:
        return head

    def masked(self, a: Tensor, task: None = None) -> Tensor:
        return a

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        yield


def states(random: Tensor) -> Tensor:
    """Map uniform numbers in [-1, 1], ``[B, 4]``, to latents all over the cart-pole's range, ``[B, 5]``."""
    angle, x, v, w = (random * torch.tensor([math.pi, 1.6, 3.0, 8.0])).unbind(-1)
    return torch.stack([x, angle.cos(), angle.sin(), v, w], -1) / UNITS


def hanging(random: Tensor) -> Tensor:
    """Map normal numbers ``[B, 5]`` to latents close to the pole's rest, where episodes of cartpole-swingup start."""
    return torch.tensor([0.0, -1.0, 0.0, 0.0, 0.0]) + 0.01 * random


class CartPoleEnv:
    """The same as an environment, whose observations are the latents.

    Args:
        steps: Steps per episode.
        ends: Step after which episodes end on their own; None for none that do.
        fails: Random seeds of episodes whose simulator raises at step 3.
    """

    name, observation_dim, action_dim = "cart-pole", 5, 1

    def __init__(self, steps: int = 40, ends: int | None = None, fails: tuple[int, ...] = ()) -> None:
        self.episode_length, self._ends, self._fails, self._model = steps, ends, fails, CartPole()

    def reset(self, seed: int) -> np.ndarray:
        self._seed, self._t, self.terminated = seed, 0, False
        self._z = states(2 * torch.rand(1, 4, generator=torch.Generator().manual_seed(seed)) - 1)
        return self._z[0].numpy()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        self._t += 1
        if self._seed in self._fails and self._t == 3:
            raise FloatingPointError("the simulation blew up")
        a, reward = torch.as_tensor(action, dtype=torch.float32)[None], 0.0
        if not self.terminated:
            reward, self._z = float(self._model.reward(self._z, a)), self._model.next(self._z, a)
        self.terminated = self.terminated or self._t == self._ends
        return self._z[0].numpy(), reward, self._t == self.episode_length

    def state(self) -> np.ndarray:
        return self._z[0].double().numpy()

    def set_state(self, state: np.ndarray) -> np.ndarray:
        self._z = torch.from_numpy(state)[None].float()
        return self._z[0].numpy()
