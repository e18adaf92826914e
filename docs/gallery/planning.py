"""# Plan with a world model

The shipped cart-pole agent swings the pole up by its policy, and by a beam search over latent states around it. A world model also says
beforehand what a plan will earn.
"""

import matplotlib.pyplot as plt
import torch

import ttcfast
from ttcfast.pwm.envs import make_env
from ttcfast.pwm.planning import Planner

torch.set_num_threads(1)
agent = ttcfast.load("examples/cartpole/agent.safetensors")
env = make_env("cartpole-swingup")

# %%
# Every 20 ms the planner tries 16 actions from each of 8 beams, 8 steps ahead, values what comes after by the critic, and takes the first
# action of the best sequence. The policy's own sequence is among them.


def episode(choose, steps=250):
    obs, rewards, upright = torch.from_numpy(env.reset(0)), [], []
    for _ in range(steps):
        with torch.no_grad():
            action = choose(obs[None].float())[0]
        after, reward, *_ = env.step(action.numpy())
        obs = torch.from_numpy(after)
        rewards.append(float(reward)), upright.append(float(obs[1]))
    return rewards, upright


planner = Planner(agent.model, horizon=8, samples=16, width=8, method="beam", policy=agent.policy.act, value=agent.policy.value)
planner.reset(1)
found = {"policy": episode(agent.act), "beam search": episode(lambda obs: planner.act(agent.model.encode(obs)))}
for name, (rewards, _) in found.items():
    print(f"{name}: return {sum(rewards):.1f} in {len(rewards)} steps")
print(f"{planner.evaluations / planner.actions:.0f} steps of the world model per action")

# %%

figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for name, (rewards, upright) in found.items():
    axes[0].plot(upright, label=name), axes[1].plot(torch.tensor(rewards).cumsum(0), label=name)
axes[0].set_ylabel("cosine of the pole's angle"), axes[1].set_ylabel("return so far")
for place in axes:
    place.set_xlabel("step"), place.legend()

# %%
# The value of a plan from the hanging pole, by the model, for growing horizons. Its unit is the reward of the world model, discounted.

obs = torch.from_numpy(env.reset(0))[None].float()
for horizon in (1, 4, 8, 16):
    planner = Planner(agent.model, horizon=horizon, samples=16, width=8, method="beam", policy=agent.policy.act, value=agent.policy.value)
    planner.reset(1)
    planner.act(agent.model.encode(obs))
    print(f"horizon {horizon:>2}: value {float(planner.last.value):.1f}, {planner.evaluations} steps of the world model")
