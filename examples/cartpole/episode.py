"""Plays the trained cart-pole agent for one episode and draws it: ``python examples/cartpole/episode.py episode.gif``.

Also prints, beside the simulator, how sensitive the world model is and how well its gradients agree with the simulator's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import ttcfast
from ttcfast.pwm.envs import DMControlEnv
from ttcfast.pwm.envs.video import record_video
from ttcfast.pwm.evaluation.gradients import beside_simulator, sensitivity


def main(path: str) -> None:
    agent = ttcfast.load(Path(__file__).with_name("agent.safetensors"))
    env = DMControlEnv("cartpole-swingup")
    print(f"return {record_video(env, lambda obs, step, episodes: agent.act(obs), path):.0f} of 1000; see {path}")
    ours, theirs = beside_simulator(agent, env, seed=0, every=25)
    each = torch.nn.functional.cosine_similarity(ours.flatten(1), theirs.flatten(1))
    whole = torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
    print(f"cosine of the gradients of 16 steps with the simulator's: {whole:.2f}")
    print(f"along the episode: {[round(float(c), 2) for c in each]}")
    obs = torch.from_numpy(env.reset(0))[None]
    print(sensitivity(agent.model, agent.model.encode(obs), agent.act(obs)))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "episode.gif")
