"""``python -m bench.training_cost``: what PWM's published training costs at its sizes, and what that makes in hours.

Counted are ``bench/plain_agent.py``'s losses and their gradients on tensors without data: FLOPs of the products (a multiplication and an
addition are two), and bytes of weights, gradients, Adam's moments and everything that autograd keeps. Hours divide FLOPs by a sustained
rate, which is given and not measured; ``--measure`` times updates of our own at two sizes, with smaller batches, on this machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ttcfast.integrators import Heun
from ttcfast.pwm.algorithms import PWM
from ttcfast.pwm.algorithms.actor_critic import AgentConfig
from ttcfast.pwm.models import FlowWorldModel, MLPWorldModel
from ttcfast.pwm.models.base import SIZES

from . import plain_agent

# PWM's published settings (arXiv:2407.02466 and its configuration): updates of the world model, batch and horizon; per task the same.
WM_UPDATES, WM_BATCH, POLICY_UPDATES, POLICY_BATCH, HORIZON, CRITIC_PASSES = 10_000_000, 1024, 10_000, 512, 16, 8
ACTOR, CRITIC, MEMBERS = (400, 200, 100), (400, 200), 3
SUITES = {"MT30": (24, 6, 30), "MT80": (39, 6, 80)}  # sizes of observation and action, and tasks
KINDS = {"mlp": "MLP", "heun": "flow, Heun K = 2"}


@dataclass(frozen=True)
class Cost:
    """FLOPs of an update, and bytes while it is made."""

    flops: float
    bytes: int


@cache
def costs(size: str, kind: str, suite: str) -> tuple[Cost, Cost]:
    """Return the cost of an update of the world model and of one of the policy."""
    observation, action, _ = SUITES[suite]
    of, task = SIZES[size], SIZES[size]["task_dim"]
    with torch.device("meta"):
        # The task's embedding joins the observation and the action, which adds the same columns as our models have.
        sizes = observation + task, action + task, of["latent_dim"]
        model = plain_agent.WorldModel(kind, sizes, of["units"], of["encoder_units"], 2)
        agent = plain_agent.Agent(model, of["latent_dim"], action + task, ACTOR, 1.0)
        agent.critics = nn.ModuleList(plain_agent.MLP(of["latent_dim"], CRITIC, 1) for _ in range(MEMBERS))
        obs, act = torch.empty(HORIZON + 1, WM_BATCH, sizes[0]), torch.empty(HORIZON, WM_BATCH, sizes[1])
        z, noise = torch.empty(POLICY_BATCH, of["latent_dim"]), torch.empty(HORIZON, POLICY_BATCH, sizes[1])
        states, goals = torch.empty(HORIZON * POLICY_BATCH, of["latent_dim"]), torch.empty(HORIZON * POLICY_BATCH)
    weights = 4 * sum(p.numel() for p in model.parameters())
    wm = _counted(lambda: plain_agent.world_model_loss(model, obs, act, torch.empty(HORIZON, WM_BATCH, 1, device="meta")), model)
    model.requires_grad_(False)
    actor = _counted(lambda: plain_agent.actor_loss(agent, z, noise)[0], agent.actor)
    critic = _counted(lambda: plain_agent.critic_loss(agent, states, goals), agent.critics)
    policy = Cost(actor.flops + CRITIC_PASSES * critic.flops, weights + max(actor.bytes, critic.bytes))
    return Cost(wm.flops, 4 * weights + wm.bytes), policy


def _counted(loss: Callable[[], Tensor], trained: nn.Module) -> Cost:
    """Count ``loss`` and its gradient, and the bytes of what autograd keeps of it beside parameters."""
    kept: dict[int, int] = {}
    owned = {id(p.untyped_storage()) for p in trained.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in owned:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = loss()
        torch.autograd.grad(found, [p for p in trained.parameters() if p.requires_grad], allow_unused=True)
    return Cost(counter.get_total_flops(), sum(kept.values()))


def rows(rate: float, sizes: Sequence[str] = ("5M", "19M", "48M", "317M")) -> Iterator[list[str]]:
    """Yield a row per suite, size and kind of dynamics; ``rate`` in TFLOP/s."""
    for suite, (*_, tasks) in SUITES.items():
        for size in sizes:
            for kind, label in KINDS.items():
                wm, policy = costs(size, kind, suite)
                hours = [updates * cost.flops / (rate * 1e12) / 3600 for updates, cost in ((WM_UPDATES, wm), (POLICY_UPDATES, policy))]
                memory = [f"{cost.bytes / 2**30:.1f}" for cost in (wm, policy)]
                flops = [f"{cost.flops / 1e12:.3g}" for cost in (wm, policy)]
                yield [suite, size, label, *flops, " / ".join(memory), f"{hours[0]:,.0f}", f"{tasks * hours[1]:,.1f}"]


def table(rate: float) -> str:
    """Return the table as Markdown."""
    heads = ["suite", "size", "dynamics", "TFLOP per model update", "per policy update", "GiB model / policy"]
    heads += ["hours, world model", "hours, all policies"]
    lines = ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * 3 + ["---:"] * 5, *rows(rate))]
    return "\n".join(lines)


def measured(size: str, kind: str, batch: int, updates: int = 3) -> tuple[float, float]:
    """Return seconds and GFLOP/s of an update of our own world model at MT30's sizes with a smaller batch, the least of a few."""
    observation, action, tasks = SUITES["MT30"]
    names = [f"task {i}" for i in range(tasks)]
    more = {"integrator": Heun(2)} if kind == "heun" else {}
    made = (FlowWorldModel if kind == "heun" else MLPWorldModel).of_size(size, observation, action, multitask=True, tasks=names, **more)
    agent = PWM(made)
    agent.add_policy(AgentConfig(), task=names[0])
    obs, act = torch.randn(HORIZON + 1, batch, observation), torch.rand(HORIZON, batch, action)
    given, best = (obs, act, torch.randn(HORIZON, batch, 1), torch.zeros(batch, dtype=torch.int64)), float("inf")
    for _ in range(updates):
        started = time.perf_counter()
        agent.update_wm(*given)
        best = min(best, time.perf_counter() - started)
    return best, costs(size, kind, "MT30")[0].flops * batch / WM_BATCH / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.training_cost", description=__doc__.split(":")[1].split("\n")[0].strip())
    parser.add_argument("--rate", type=float, default=100.0, help="sustained TFLOP/s (100)")
    parser.add_argument("--measure", action="store_true", help="also time updates of sizes 5M and 48M on this CPU")
    options = parser.parse_args()
    print(table(options.rate))
    if options.measure:
        for size, batch in (("5M", 64), ("48M", 16)):
            for kind, label in KINDS.items():
                seconds, rate = measured(size, kind, batch)
                print(f"{label}, {size}, batch {batch}, {torch.get_num_threads()} threads: {seconds:.2f} s an update, {rate:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
