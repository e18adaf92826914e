"""Updates of an agent at the settings of ``alg=pwm_control agent=control``: of its world model, of its policy, and one of each.

An update is everything: losses, gradients, clipping, Adam and, for the policy, four minibatches of the critic. Observation 5, action 1,
latent 16, units 128 x 2, actor and critics 64 x 2; batch 64, horizons 8 and 16. ``heun`` is the flow with two substeps.

* ``plain torch``: ``bench/plain_agent.py``, eager. The gate gives it our weights and noise: losses, gradients and targets must agree.
* ``torch.compile``: its three losses compiled, for the residual model alone. A flow's 64 evaluations take minutes to compile.

Cases ``3 seeds`` make one update of each for three agents: at once, and by ``one by one``, each agent alone. The gate wants the same bits
on the CPU. A ratio of 2 means that three random seeds take 1.5 times as long as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.integrators import Heun
from ttcfast.pwm.algorithms import PWM
from ttcfast.pwm.algorithms.actor_critic import ActorCritic, AgentConfig
from ttcfast.pwm.algorithms.together import RandomStream, Together
from ttcfast.pwm.models import FlowWorldModel, MLPWorldModel, ResidualWorldModel

from . import plain_agent, timing
from .groups import compiled
from .plain_agent import Agent, WorldModel
from .targets import Target
from .timing import Case

KINDS = ("mlp", "residual", "heun")
MODELS = {"mlp": MLPWorldModel, "residual": ResidualWorldModel, "heun": FlowWorldModel}
OBSERVATION, ACTION, LATENT, REWARD = 5, 1, 16, 2.0
OURS, PLAIN, COMPILED = "ttcfast", "plain torch", "torch.compile"
UPDATES = ("world model", "policy", "both")
SEEDS, ONE_BY_ONE = 3, "one by one"
PARTS = ("actor", "critic", "target")
# The configuration files, written out, since a GPU machine may have no hydra; tests/bench/test_agent.py compares them.
WM = {"lr": 2e-3, "reward_weight": 1.0}
AGENT = {
    "actor_lr": 3e-3,
    "critic_lr": 1e-3,
    "lr_floor": 0.05,
    "critic_passes": 1,
    "target_rate": 0.05,
    "bootstrap": "mean",
    "detach": False,
}

TARGETS = (
    *(Target(f"{name} *", PLAIN, "ratio", least=1.8) for name in UPDATES),
    Target(f"{SEEDS} seeds *", ONE_BY_ONE, "ratio", least=2.0),
)


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    for kind in KINDS:
        for name in UPDATES:
            problem = Problem(kind, tiny, device)  # of its own: after a thousand updates on noise, rounding tells the peers apart
            peers: dict[str, Callable[[Problem], Any]] = {
                peer: lambda p, peer=peer, name=name: p.update(peer, name)  # type: ignore[misc]
                for peer in (OURS, PLAIN, *([COMPILED] if kind == "residual" else []))
            }
            yield problem.case("agent", f"{name} {kind}", problem.shape, "float32", peers)
    for kind in KINDS:
        several = Several(kind, tiny, device)
        turns: dict[str, Callable[[Several], Any]] = {OURS: Several.at_once, ONE_BY_ONE: Several.one_by_one}
        yield several.case("agent", f"{SEEDS} seeds {kind}", several.shape, "float32", turns)


class Problem(timing.Problem):
    """An agent of one kind, ours and plain, and a batch of windows."""

    def __init__(self, kind: str, tiny: bool, device: str) -> None:
        self.kind, self.tiny, self.device = kind, tiny, device
        self.units, self.small, self.batch, self.horizons = ((8, 8), (8, 8), 8, (2, 2)) if tiny else ((128, 128), (64, 64), 64, (8, 16))
        self.steps = 0

    @property
    def shape(self) -> str:
        return f"[{self.batch}, {LATENT}], H {self.horizons[0]} and {self.horizons[1]}, units {self.units[0]}x{len(self.units)}"

    @cached_property
    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        draws, (horizon, _) = self.generator(1), self.horizons

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draws, device=self.device)

        return normal(horizon + 1, self.batch, OBSERVATION), normal(horizon, self.batch, ACTION).tanh(), normal(horizon, self.batch, 1)

    @cached_property
    def ours(self) -> PWM:
        torch.manual_seed(0)
        agent = made(self.kind, self.units, self.small, self.horizons[1], self.device)
        with torch.no_grad():  # a fresh actor and reward are 0, of which there is nothing to compare
            for p in [*agent.model.parameters(), *policy_of(agent).actor.parameters(), *policy_of(agent).critic.parameters()]:
                p.add_(0.05 * torch.randn_like(p))
        return agent

    @cached_property
    def plain(self) -> Agent:
        return self._copy(lambda loss: loss)

    @cached_property
    def compiled(self) -> Agent:
        return self._copy(lambda loss: compiled(loss, tiny=self.tiny))

    def _copy(self, wrap: Callable[[Any], Any]) -> Agent:
        """Return the plain agent with our weights."""
        model = WorldModel(self.kind, (OBSERVATION, ACTION, LATENT), self.units, self.units[:1], 2)
        agent = Agent(model, LATENT, ACTION, self.small, policy_of(self.ours).unit, wrap).start(self.device)
        with torch.no_grad():
            for mine, part, theirs in self.pairs(agent):
                theirs.copy_(part(mine))
        return agent

    def pairs(self, agent: Agent) -> Iterator[tuple[nn.Parameter, Callable[[Tensor], Tensor], nn.Parameter]]:
        """Yield our parameters with those of the plain agent, and what takes the latter's part of the former."""
        ours, policy = self.ours.model, policy_of(self.ours)
        networks: list[Any] = [ours.encoder_network, ours.dynamics_network, ours.reward_network, policy.actor.network]
        for network, theirs in zip(networks, (agent.model.encoder, agent.model.dynamics, agent.model.head, agent.actor)):
            mine = [t for part in network.parts() for t in part]
            linears = [*theirs.hidden, theirs.last]
            others = [
                *(m.weight for m in linears),
                *(m.bias for m in linears),
                *(n.weight for n in theirs.norms),
                *(n.bias for n in theirs.norms),
            ]
            yield from ((p, lambda t: t, q) for p, q in zip(mine, others))
        yield policy.actor.log_std, lambda t: t, agent.log_std
        for several, critics in ((policy.critic, agent.critics), (policy.target, agent.targets)):
            for m, critic in enumerate(critics):
                linears = [*critic.hidden, critic.last]
                yield from ((p, lambda t, m=m: t[m].mT, q.weight) for p, q in zip(several.weights, linears))
                vectors = [*several.biases, *several.scales, *several.shifts]
                others = [*(q.bias for q in linears), *(n.weight for n in critic.norms), *(n.bias for n in critic.norms)]
                yield from ((p, lambda t, m=m: t[m, 0], q) for p, q in zip(vectors, others))

    def update(self, peer: str, name: str) -> list[Any]:
        agent: Any = self.ours if peer == OURS else self.plain if peer == PLAIN else self.compiled
        found = []
        if name != "policy":
            found.append(agent.update_wm(*self.data))
        if name != "world model":
            self.steps += 1
            found.append(agent.update_policy(self.data[0][0], self.steps if peer == OURS else self.horizons[1]))
        return found

    def check(self, peers: Any) -> None:
        """Losses and gradients of all three kinds, and the critic's targets, agree."""
        policy, fresh = policy_of(self.ours), self._copy(lambda loss: loss)
        obs, act, rew = self.data
        torch.manual_seed(2)
        mine = self.ours.compute_wm_loss(obs, act, rew).total
        torch.manual_seed(2)
        self._agree("world model", fresh, mine, plain_agent.world_model_loss(fresh.model, obs, act, rew))
        z, noise = self.ours.model.encode(obs[0]).detach(), policy.noise(self.batch, 3, self.device)
        rollout = policy.imagine(z, noise)
        theirs, states, rewards = plain_agent.actor_loss(fresh, z, noise)
        self._agree("actor", fresh, policy.actor_loss(rollout), theirs)
        close("targets", policy.targets(rollout.each(Tensor.detach)), fresh.goals(states, rewards))
        some, goals = states[0], rewards[0] / policy.unit
        self._agree("critic", fresh, (policy.critic(some) - goals).square().mean(), plain_agent.critic_loss(fresh, some, goals))
        for peer in peers:
            self.update(peer, "both")

    def _agree(self, name: str, agent: Agent, mine: Tensor, theirs: Tensor) -> None:
        """Raise unless two losses and their gradients agree."""
        close(f"loss of the {name}", mine, theirs)
        pairs = [pair for pair in self.pairs(agent) if pair[2].requires_grad]
        owned = list(dict.fromkeys(p for p, *_ in pairs))
        gradients = dict(zip(owned, torch.autograd.grad(mine, owned, allow_unused=True)))
        others = torch.autograd.grad(theirs, [q for *_, q in pairs], allow_unused=True)
        for (p, part, _), other in zip(pairs, others):
            own = gradients[p]
            if own is not None and other is not None:
                close(f"gradient of the {name} in a parameter of shape {tuple(other.shape)}", part(own), other)


class Several(Problem):
    """Agents of several random seeds, twice: those that train at once and those that train alone."""

    @cached_property
    def batches(self) -> list[tuple[Tensor, ...]]:
        return [tuple(t.roll(i, 1) for t in self.data) for i in range(SEEDS)]

    def agents(self) -> list[PWM]:
        found = []
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            found.append(made(self.kind, self.units, self.small, self.horizons[1], self.device, seed))
        return found

    @cached_property
    def alone(self) -> list[tuple[PWM, RandomStream]]:
        return [(agent, RandomStream()) for agent in self.agents()]

    @cached_property
    def together(self) -> Together:
        agents = self.agents()
        return Together(agents, [RandomStream() for _ in agents])

    def at_once(self) -> None:
        self.steps += 1
        obs, act, rew = (torch.stack(parts, 1) for parts in zip(*self.batches))
        self.together.update_wm(obs, act, rew)
        self.together.update_policy(obs[0], self.steps)

    def one_by_one(self) -> None:
        self.steps += 1
        for (agent, stream), (obs, act, rew) in zip(self.alone, self.batches):
            with stream.own():
                agent.update_wm(obs, act, rew)
                agent.update_policy(obs[0], self.steps)

    def check(self, peers: Any) -> None:
        """After five updates the agents that trained at once are those that trained alone: on the CPU bit for bit."""
        for run in (self.at_once, self.one_by_one):
            self.steps = 0
            for _ in range(5):
                run()
        for mine, (theirs, _) in zip(self.together.agents, self.alone):
            for part, other in ((mine.model, theirs.model), *((getattr(policy_of(mine), n), getattr(policy_of(theirs), n)) for n in PARTS)):
                for p, q in zip(part.parameters(), other.parameters()):
                    assert torch.equal(p, q) or self.device != "cpu", "the weights differ"
                    close("weights", p, q)


def made(kind: str, units: tuple[int, ...], small: tuple[int, ...], horizon: int, device: str, seed: int = 0) -> PWM:
    """Return an agent with an untrained policy."""
    more: dict[str, Any] = {"integrator": Heun(2)} if kind == "heun" else {}
    linear = {"last_layer": "linear"}
    sizes: dict[str, Any] = {"latent_dim": LATENT, "units": units, "encoder_units": units[:1], "encoder": linear, "standardise": True}
    model = MODELS[kind](OBSERVATION, ACTION, **sizes, **more).to(device)
    agent = PWM(model, **WM)
    config = AgentConfig(horizon=horizon, actor={"units": small}, critic={"units": small, "members": 2}, **AGENT)
    agent.add_policy(config, reward_scale=REWARD, seed=seed)
    return agent


def policy_of(agent: PWM) -> ActorCritic:
    assert agent.policy is not None
    return agent.policy


def close(name: str, mine: Tensor, theirs: Tensor) -> None:
    """Raise unless two tensors agree to 1 in 10,000, of their norm."""
    error = (mine - theirs).detach().norm() / theirs.detach().norm().clamp_min(1e-12)
    assert float(error) < 1e-4, f"{name}: relative error {float(error):.1e}"
