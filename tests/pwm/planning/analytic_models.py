"""World models written as formulas, whose best plans are known."""

from __future__ import annotations

import torch
from torch import Tensor

TIME_STEP, GAMMA = 0.2, 0.95


class DoubleIntegrator:
    """State (x, v), acceleration by the action; the reward is quadratic."""

    latent_dim, action_dim = 2, 1
    costs = (1.0, 0.1, 0.05)  # of x^2, v^2, a^2

    def step(self, z: Tensor, a: Tensor, task: object = None) -> tuple[Tensor, Tensor]:
        x, v = z[..., :1], z[..., 1:]
        reward = -(self.costs[0] * x * x + self.costs[1] * v * v + self.costs[2] * a * a)
        return torch.cat([x + TIME_STEP * v, v + TIME_STEP * a], -1), reward


def riccati(steps: int) -> tuple[Tensor, Tensor]:
    """Gain K ``[1, 2]`` of the first step and P ``[2, 2]`` of the best discounted value ``-z P z`` with so many steps to go, float64."""
    a = torch.tensor([[1, TIME_STEP], [0, 1]]).double()
    b = torch.tensor([[0], [TIME_STEP]]).double()
    q, r = torch.diag(torch.tensor(DoubleIntegrator.costs[:2]).double()), DoubleIntegrator.costs[2]
    p = torch.zeros(2, 2).double()
    k = torch.zeros(1, 2).double()
    for _ in range(steps):
        k = GAMMA * (b.T @ p @ a) / (r + GAMMA * b.T @ p @ b)
        p = q + GAMMA * a.T @ p @ (a - b @ k)
    return k, p


class Stationary:
    """The best policy of the double integrator without bounds, and its value; elementwise, so that rows do not depend on each other."""

    def __init__(self) -> None:
        k, p = riccati(1000)
        self.k, self.p = k.flatten().tolist(), p.flatten().tolist()

    def policy(self, z: Tensor) -> Tensor:
        return -(self.k[0] * z[..., :1] + self.k[1] * z[..., 1:])

    def value(self, z: Tensor) -> Tensor:
        x, v = z.unbind(-1)
        return -(self.p[0] * x * x + (self.p[1] + self.p[2]) * x * v + self.p[3] * v * v)


class Tree:
    """A tree of three branches, taken by the rounded action; the reward is a number of the node that is reached."""

    latent_dim, action_dim = 1, 1

    def __init__(self, depth: int) -> None:
        self.rewards = torch.randn(3 ** (depth + 1), generator=torch.Generator().manual_seed(4))

    def step(self, z: Tensor, a: Tensor, task: object = None) -> tuple[Tensor, Tensor]:
        following = 3 * z + a.round() + 2  # the root is 0, its children are 1, 2, 3
        return following, self.rewards[following.long()]

    def best(self, node: int, depth: int, gamma: float) -> float:
        """The best discounted value of all sequences from a node."""
        if depth == 0:
            return 0.0
        children = [3 * node + branch for branch in (1, 2, 3)]
        return max(float(self.rewards[child]) + gamma * self.best(child, depth - 1, gamma) for child in children)

    def greedy(self, depth: int, gamma: float) -> float:
        """The discounted value of taking the best reward at every step."""
        node, total = 0, 0.0
        for t in range(depth):
            node = max((3 * node + branch for branch in (1, 2, 3)), key=lambda child: float(self.rewards[child]))
            total += gamma**t * float(self.rewards[node])
        return total


class Broken(DoubleIntegrator):
    """The reward is ``bad`` where the action is above ``limit``."""

    def __init__(self, bad: float, limit: float) -> None:
        self.bad, self.limit = bad, limit

    def step(self, z: Tensor, a: Tensor, task: object = None) -> tuple[Tensor, Tensor]:
        following, reward = super().step(z, a)
        return following, torch.where(a > self.limit, self.bad, reward + a)  # up to the limit, more is better
