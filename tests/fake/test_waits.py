"""How often a step makes the host wait for the GPU: once in a greedy search, twice with several beams, whatever else it does.

Source: docs/design/decisions.md ("Host waits").
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.fake.cases import CASES, GREEDY
from tests.fake.test_device import every_operation
from tests.fake.test_world_models import H, agent, sequences, together
from tests.fake_cuda import FakeCuda
from ttcfast.pwm.algorithms.actor_critic import AgentConfig
from ttcfast.pwm.planning import METHODS, plan

SHORT, LONG = 2, 4
RARE = {"fallbacks", "dying problems", "beams with fallbacks", "dying beams", "budget", "beams on a budget"}  # steps of other kinds
MORE = {
    "ensemble": 1,  # its solver looks at its states
    "beams of an ensemble": 1,
    "span": 1,  # how many problems have a span
    "span of the oracle": 1,
}


def waits_a_step(name: str) -> dict[tuple[str, str], float]:
    """Waits of a step beyond the first ones, by place and reason."""
    case, counts = CASES[name], []
    with FakeCuda() as gpu:
        search, x0 = case.search("cuda"), case.start().cuda()
        for steps in (1, SHORT, LONG):  # the first fills caches
            with gpu.counting() as waits:
                search.rollout(x0, steps, **case.rollout)
            counts.append(waits)
    return {key: n / (LONG - SHORT) for key, n in (counts[2] - counts[1]).items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in CASES if name not in RARE])
def test_a_step_waits_once_or_with_beams_twice(name):
    found = waits_a_step(name)
    assert sum(found.values()) == (1 if name in GREEDY else 2) + MORE.get(name, 0), found
    assert all(place.startswith("ttcfast/") for place, _ in found), found


def test_more_beams_problems_and_candidates_wait_no_more_at_the_start():
    counts = []
    for case in (CASES["beams"], CASES["beams in chunks"]):
        with FakeCuda() as gpu:
            search, x0 = case.search("cuda"), case.start().cuda()
            search.rollout(x0, 1)
            with gpu.counting() as waits:
                search.rollout(x0, 1)
        counts.append(sum(waits.values()))
    assert counts[0] < 20 and counts[1] < 40, counts  # looking for candidates that differ, chunk by chunk


@pytest.mark.parametrize("kind", ["mlp", "residual", "flow"])
def test_an_update_of_a_world_model_waits_once(kind):
    with FakeCuda() as gpu:
        found, batch = agent(kind, "cuda"), sequences("cuda")
        found.update_wm(*batch)
        with gpu.counting() as waits:
            found.update_wm(*batch)
    assert sum(waits.values()) == 1, waits


def test_an_update_of_a_policy_waits_twice_and_an_action_never():
    config = AgentConfig(horizon=3, actor={"units": [16]}, critic={"units": [16], "members": 2}, critic_passes=2, critic_minibatches=2)
    with FakeCuda() as gpu:
        found, obs = agent("flow", "cuda"), sequences("cuda")[0]
        found.add_policy(config)
        found.update_policy(obs[0], 0)
        with gpu.counting() as waits:
            found.update_policy(obs[1], 1)
        assert sum(waits.values()) == 2, waits
        with gpu.counting() as waits:
            found.act(obs[2])
        assert not waits


def test_updates_of_agents_together_wait_as_often_as_one_agents():
    with FakeCuda() as gpu:
        both, (obs, act, rew) = together("cuda"), (torch.stack([x, x], 1) for x in sequences("cuda"))
        for count, update in ((1, lambda: both.update_wm(obs, act, rew)), (2, lambda: both.update_policy(obs[0], 0))):
            update()
            with gpu.counting() as waits:
                update()
            assert sum(waits.values()) == count, waits


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_waits_for_nothing(method):
    with FakeCuda() as gpu:
        model, obs = agent("mlp", "cuda").model, sequences("cuda")[0]
        z = model.encode(obs[0]).detach()
        given = {"policy": lambda z: z[..., :3].tanh(), "value": lambda z: z.sum(-1), "method": method}
        plan(model, z, H, 16, **given)
        with gpu.counting() as waits:
            plan(model, z, H, 16, chunk_size=32, **given)
    assert not waits, waits


def test_operations_wait_for_nothing():
    with FakeCuda() as gpu:
        every_operation("cuda")
        with gpu.counting() as waits:
            every_operation("cuda")
    ours = Counter({key: n for key, n in waits.items() if not key[0].startswith("tests/")})  # the test's own copies
    tables = [key for key in ours if "accumulate_moments" in key[0]]  # of new tensors, once
    assert set(ours) == set(tables), ours
    assert torch.tensor(list(ours.values())).sum() <= 1
