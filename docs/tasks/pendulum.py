"""# Train and plan with a world model on a gymnasium environment

With `pip install '.[gym]'`, run `python pendulum.py` in an empty folder: random episodes of Pendulum-v1 train a world model, a policy is
trained inside it, and the agent plays by its policy and by planning. For another environment with continuous actions, change the name.
"""

import subprocess
import sys

import torch

import ttcfast
from ttcfast.pwm.envs import EnvPool, make_env
from ttcfast.pwm.evaluation.play import play
from ttcfast.pwm.planning import plan

TASK = "gymnasium:Pendulum-v1"

# %%
# Forty random episodes of 100 steps, two of the simulator's each, as `ttcfast collect 'tasks=[gymnasium:Pendulum-v1]' episodes=40 out=data`
# records them in a terminal.

command = [sys.executable, "-m", "ttcfast.cli.collect", f"tasks=[{TASK}]", "episodes=40", "out=data"]
subprocess.run(command, check=True)

# %%
# A world model, 600 updates on these episodes, and a policy, 75 updates inside the model. Folder `agent` receives both, with the log.

short = ["wm_steps=600", "steps=75", "eval_every=75", "eval_episodes=2", "final_episodes=2"]
command = [sys.executable, "-m", "ttcfast.cli.train_policy", "data=data", "out=agent", *short]
subprocess.run(command, check=True)

# %%
# The agent in the simulator, on episodes that no training saw. The planner tries 8 actions from each of 4 beams, 8 steps ahead.

agent = ttcfast.load("agent/agent.safetensors")
planning = {"method": "beam", "horizon": 8, "samples": 8, "width": 4}
with EnvPool([lambda: make_env(TASK)]) as pool:
    print(f"policy: return {play(agent, pool, seeds=[7]).mean:.0f}")
    found = play(agent, pool, seeds=[7], planning=planning)
    print(f"planning: return {found.mean:.0f}, {found.evaluations:.0f} steps of the world model per action")

# %%
# A plan from one observation, and what the world model expects of it:

obs = torch.tensor([[-1.0, 0.0, 0.0]])  # the pendulum hangs: cosine, sine and angular velocity
policy = {"policy": agent.policy.act, "value": agent.policy.value}
best = plan(agent.model, agent.model.encode(obs), 8, 8, method="beam", width=4, **policy)
print(f"first action {float(best.actions[0, 0, 0]):.2f}, value {float(best.value[0]):.1f}")
