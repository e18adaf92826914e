import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pwm.planning.analytic_models import GAMMA, Broken, DoubleIntegrator, Stationary, Tree, riccati
from tests.pwm.small_models import small, stirred
from ttcfast.pwm.models import FlowWorldModel, MLPWorldModel
from ttcfast.pwm.planning import METHODS, Plan, plan
from ttcfast.runtime.errors import ArgumentError

H = 12
MODEL = DoubleIntegrator()
BEST = Stationary()


def starts(n: int = 4) -> torch.Tensor:
    """States from which the best actions stay within the bounds."""
    angle = torch.arange(n) * 1.3
    return 0.15 * torch.stack([angle.cos(), angle.sin()], 1)


def value_of(model, z: torch.Tensor, actions: torch.Tensor, gamma: float = GAMMA) -> tuple[torch.Tensor, torch.Tensor]:
    """Discounted rewards of sequences ``[N, H, A]`` and last states, in float64."""
    z, total = z.double(), 0.0
    for t, a in enumerate(actions.double().unbind(1)):
        z, reward = model.step(z, a)
        total = total + gamma**t * reward[:, 0]
    return total, z


def rolled(model, z: torch.Tensor, policy) -> torch.Tensor:
    """The policy's own sequence, ``[N, H, A]``."""
    actions = []
    for _ in range(H):
        actions.append(policy(z).clamp(-1, 1))
        z, _ = model.step(z, actions[-1])
    return torch.stack(actions, 1)


def same(one: Plan, other: Plan, rows: slice = slice(None)) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Plan) if f.name != "evaluations"]
    return all(torch.equal(a[rows], b) for a, b in pairs)


@pytest.mark.parametrize("method", METHODS)
def test_the_value_comes_close_to_the_optimum_and_beats_random_shooting(method):
    """The beam ranks unfinished sequences, so it needs the critic: accelerating pays off only later."""
    z, samples, beam = starts(), 256, method == "beam"
    given = {"value": BEST.value, "width": 32} if beam else {"temperature": 20.0, "std_min": 0.01, "iterations": 10}
    found = plan(MODEL, z, H, samples, method=method, gamma=GAMMA, **given)
    best = BEST.value(z.double()) if beam else -torch.einsum("ni,ij,nj->n", z.double(), riccati(H)[1], z.double())

    def value(z, actions):
        total, last = value_of(MODEL, z, actions)
        return total + GAMMA**H * BEST.value(last) if beam else total

    torch.testing.assert_close(found.value.double(), value(z, found.actions), rtol=1e-5, atol=1e-6)
    assert (found.value <= best + 1e-6).all() and (found.value > 1.01 * best).all()
    count = found.evaluations // (len(z) * H)
    shots = 2 * torch.rand(count * len(z), H, 1) - 1  # as many evaluations
    assert (found.value > value(z.repeat(count, 1), shots).view(count, -1).amax(0)).all()
    assert found.actions.shape == (4, H, 1) and found.std.shape == (4, H, 1) and not found.fallback.any()


def test_mppi_without_temperature_is_cem_and_its_deviation_shrinks():
    mppi, cem = (plan(MODEL, starts(), H, 64, method=method, temperature=0.0, elites=6) for method in ("mppi", "cem"))
    assert same(mppi, cem)
    assert mppi.std.amin() >= 0.05 and mppi.std.amax() < 1.0


def test_evaluations_are_counted():
    n, g = 4, 5  # guesses: the policy's sequences
    gaussian = plan(MODEL, starts(), H, 64, iterations=3, policy=BEST.policy, policy_samples=g)
    assert gaussian.evaluations == n * H * (3 * 64 + g + 1)
    beam = plan(MODEL, starts(), H, 8, method="beam", width=4)
    assert beam.evaluations == n * (H + 8 + (H - 1) * 4 * 8)


@pytest.mark.parametrize("method", METHODS)
def test_neither_chunks_nor_batch_change_a_bit(method):
    z = torch.cat([starts(5), 3 * starts(1)])
    given = {"method": method, "policy": lambda z: BEST.policy(z) + 0.2, "value": BEST.value, "gamma": GAMMA, "width": 7}
    whole = plan(MODEL, z, 6, 100, chunk_size=10**6, **given)
    for chunk_size in (30, 97, 601):
        assert same(whole, plan(MODEL, z, 6, 100, chunk_size=chunk_size, **given))
    for rows in (slice(0, 1), slice(3, 6)):
        assert same(whole, plan(MODEL, z[rows], 6, 100, problem_ids=torch.arange(6)[rows], **given), rows)
    assert not same(whole, plan(MODEL, z, 6, 100, seed=1, **given)) and not same(whole, plan(MODEL, z, 6, 100, step=1, **given))


@pytest.mark.parametrize("method", METHODS)
def test_plans_in_a_network_do_not_depend_on_chunks_and_batch_beyond_rounding(method):
    torch.manual_seed(0)
    model = stirred(small(FlowWorldModel))
    z = model.encode(torch.randn(5, 5)).detach()
    whole = plan(model, z, 4, 64, method=method, chunk_size=10**6)
    chunked = plan(model, z, 4, 64, method=method, chunk_size=35)
    alone = plan(model, z[3:4], 4, 64, method=method, problem_ids=torch.tensor([3]))
    for rows, other in ((slice(None), chunked), (slice(3, 4), alone)):
        torch.testing.assert_close(whole.actions[rows], other.actions, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(whole.value[rows], other.value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [50, 10**6])
def test_a_beam_that_keeps_everything_is_an_exhaustive_search(chunk_size):
    depth, model, root = 4, Tree(4), torch.zeros(1, 1)
    found = plan(model, root, depth, 32, method="beam", width=3**depth, gamma=0.9, chunk_size=chunk_size)
    assert float(found.value) == pytest.approx(model.best(0, depth, 0.9), rel=1e-5)
    narrow = plan(model, root, depth, 32, method="beam", width=1, gamma=0.9, chunk_size=chunk_size)
    assert float(narrow.value) == pytest.approx(model.greedy(depth, 0.9), rel=1e-5)
    assert narrow.value < found.value


def test_a_critic_guides_the_beam():
    model, root = Tree(4), torch.zeros(1, 1)
    left = torch.tensor([model.best(node, 1, 0.9) for node in range(40)])  # of a node one step above the leaves
    two = torch.tensor([model.best(node, 2, 0.9) for node in range(13)])

    def value(z):
        node = z[..., 0].long()
        return torch.where(node <= 3, two[node.clamp_max(12)], left[node.clamp_max(39)])

    found = plan(model, root, 2, 32, method="beam", width=1, gamma=0.9, value=value)
    children = {c: float(model.rewards[c]) + 0.9 * model.best(c, 2, 0.9) for c in (1, 2, 3)}
    assert 2 + round(float(found.actions[0, 0])) == max(children, key=children.get)


@pytest.mark.parametrize("method", METHODS)
def test_the_best_policy_is_not_made_worse(method):
    z = starts()
    found = plan(MODEL, z, H, 16, method=method, gamma=GAMMA, policy=BEST.policy, value=BEST.value)
    best = BEST.value(z)
    assert (found.value >= best - 1e-6).all()
    torch.testing.assert_close(found.value, best, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.actions[:, 0], BEST.policy(z), rtol=0, atol=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_no_policy_is_made_worse_whatever_the_search_finds(method):
    torch.manual_seed(0)
    model = stirred(small(MLPWorldModel))
    z = model.encode(torch.randn(6, 5)).detach()
    with torch.no_grad():
        alone = value_of(stirred_double(model), z, rolled(model, z, lambda z: 4 * z[..., :3] - 1), 0.99)[0]
    found = plan(model, z, H, 1, method=method, policy=lambda z: 4 * z[..., :3] - 1, iterations=1, width=1)
    assert (found.value >= alone - 1e-4).all()


def stirred_double(model: MLPWorldModel) -> MLPWorldModel:
    other = small(MLPWorldModel).double()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("method", METHODS)
def test_a_warm_start_is_used_and_filled_where_it_is_not_known(method):
    z = starts()
    warm = rolled(MODEL, z, lambda z: BEST.policy(z))
    little = {"method": method, "gamma": GAMMA, "iterations": 1, "width": 1}
    cold, warmed = plan(MODEL, z, H, 2, **little), plan(MODEL, z, H, 2, warm=warm, **little)
    assert (warmed.value >= value_of(MODEL, z, warm)[0] - 1e-6).all() and (warmed.value > cold.value).all()
    unknown = torch.full_like(warm, torch.nan)
    assert (plan(MODEL, z, H, 2, warm=unknown, policy=BEST.policy, **little).value >= value_of(MODEL, z, warm)[0] - 1e-6).all()
    assert torch.equal(plan(MODEL, z, H, 2, warm=unknown, **little).value, cold.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rewards_that_are_not_finite_never_win(method, bad):
    found = plan(Broken(bad, 0.5), starts(), 3, 128, method=method, policy=lambda z: torch.ones_like(z[..., :1]))
    assert found.value.isfinite().all() and (found.actions <= 0.5).all() and not found.fallback.any()
    assert (found.actions > 0.2).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_any_finite_reward_falls_back_to_the_policy(method):
    z = starts()
    broken = Broken(torch.nan, -2.0)
    found = plan(broken, z, 3, 32, method=method, policy=lambda z: z[..., :1])
    assert found.fallback.all() and (found.value == -torch.inf).all()
    torch.testing.assert_close(found.actions[:, 0], z[:, :1])
    assert not plan(broken, z, 3, 32, method=method).actions.any()
    mixed = plan(MODEL, torch.where(torch.arange(4)[:, None] == 2, torch.nan, z), 3, 32, method=method)
    assert mixed.fallback.tolist() == [False, False, True, False]


@pytest.mark.parametrize("method", METHODS)
def test_tasks_and_action_masks_hold(method):
    torch.manual_seed(0)
    model = stirred(small(MLPWorldModel, multitask=True, tasks=("run", "walk"), action_dims=(3, 2), task_dim=4)).train()
    z = model.encode(torch.randn(4, 5), 0).detach()
    by_name, by_index = (plan(model, z, 3, 32, method=method, task=task) for task in ("walk", torch.ones(4, dtype=torch.int64)))
    assert same(by_name, by_index) and not by_name.actions[..., 2].any() and by_name.actions[..., :2].all()
    mixed = plan(model, z, 3, 32, method=method, task=torch.tensor([0, 1, 0, 1]))
    assert mixed.actions[::2].all() and not mixed.actions[1::2, :, 2].any()
    torch.testing.assert_close(mixed.actions[1::2], by_name.actions[1::2], rtol=1e-3, atol=1e-4)
    assert model.training and not mixed.value.requires_grad
    assert (mixed.actions.abs() <= 1).all() and mixed.actions.dtype == torch.float32


class NoHostWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique_dim", "_unique2")
        indices = args[1] if name == "index" else ()
        if waits or any(i is not None and i.dtype == torch.bool for i in indices):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_for_the_device(method):
    model = small(FlowWorldModel, multitask=True, tasks=("run", "walk"), action_dims=(3, 2), task_dim=4)
    z = model.encode(torch.randn(4, 5), 0).detach()
    with NoHostWaits():
        plan(model, z, 3, 32, method=method, task=torch.tensor([0, 1, 0, 1]), policy=lambda z: z[..., :3], value=lambda z: z[..., 0])
    with NoHostWaits(), pytest.raises(AssertionError, match="waits for the device"):
        bool(z.sum() > 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"horizon": 0}, "horizon is 0"),
        ({"horizon": 2.5}, "horizon is 2.5"),
        ({"samples": 0}, "samples is 0"),
        ({"method": "shooting"}, "method is 'shooting'.*'mppi', 'cem', 'beam'"),
        ({"elites": 0}, "elites is 0"),
        ({"elites": 9}, "elites is 9 and samples 8"),
        ({"width": 0, "method": "beam"}, "width is 0"),
        ({"iterations": 0}, "iterations is 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"std_min": 3.0}, "std_min is 3.0 and std_max 2.0"),
        ({"z": torch.zeros(2)}, r"z is torch.float32 \(2,\); give .*\[N, 2\]"),
        ({"z": torch.zeros(4, 3)}, r"z is torch.float32 \(4, 3\)"),
        ({"z": torch.zeros(0, 2)}, r"z is torch.float32 \(0, 2\)"),
        ({"z": torch.zeros(4, 2, dtype=torch.int64)}, "z is torch.int64"),
        ({"warm": torch.zeros(4, 2, 1)}, r"warm has shape \(4, 2, 1\); .*\(4, 3, 1\)"),
        ({"problem_ids": torch.zeros(3, dtype=torch.int64)}, r"problem_ids are torch.int64 \(3,\)"),
        ({"policy": lambda z: z}, r"policy returns \(4, \d+, 2\).*give \(4, \d+, 1\)"),
        ({"value": lambda z: z}, r"value returns \(4, \d+, 2\).*give one number each"),
        ({"task": torch.zeros(3, dtype=torch.int64)}, r"task has shape \(3,\)"),
    ],
)
def test_wrong_arguments_are_one_clear_line(given, message):
    given = {"z": starts(), "horizon": 3, "samples": 8, **given}
    with pytest.raises(ArgumentError, match=message) as caught:
        plan(MODEL, **given)
    assert "\n" not in str(caught.value)
