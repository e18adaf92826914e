"""A small exactly known system and replay shards of it: ``x' = M x + N a``, reward ``x[0] + 0.1 a``, driven by random actions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ttcfast.data.replay_shard import Episode, write_shard

_C, _S = 0.95 * torch.cos(torch.tensor(0.4)), 0.95 * torch.sin(torch.tensor(0.4))
M = torch.tensor([[float(_C), -float(_S), 0.0], [float(_S), float(_C), 0.1], [0.0, 0.0, 0.8]], dtype=torch.float64)
N = torch.tensor([[0.0], [0.1], [0.5]], dtype=torch.float64)


def move(x: Tensor, a: Tensor) -> Tensor:
    """One step of states ``[..., 3]`` under actions ``[..., 1]``."""
    return (x.double() @ M.T + a.double() @ N.T).to(x.dtype)


def earn(x: Tensor, a: Tensor) -> Tensor:
    """Reward ``[..., 1]``."""
    return x[..., :1] + 0.1 * a


def episode(seed: int, steps: int = 40, task: int = 0, padding: int = 0) -> Episode:
    g = torch.Generator().manual_seed(seed)
    act = torch.rand(steps, 1, generator=g) * 2 - 1
    states = [torch.randn(3, generator=g)]
    for a in act:
        states.append(move(states[-1], a))
    obs = torch.stack(states)
    rew = earn(obs[:-1], act)[:, 0]
    return Episode(torch.nn.functional.pad(obs, (0, padding)), act, rew, task)


def write_replays(folder: Path, episodes: int = 10, steps: int = 40) -> Path:
    """One shard of the system in ``folder``."""
    write_shard(folder / "a.pt", [episode(i, steps) for i in range(episodes)], {"task": "rotation", "number": 0, "action_dim": 1})
    return folder
