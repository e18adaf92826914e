"""A rollout that is killed goes on from its last step; what its chunks take is measured."""

import json
import subprocess
import sys

import pytest
import torch

from tests.scorers import last_cell
from tests.surrogates import brittle, drop_surrogate, euler_state
from ttcfast.rewards.common import ARMScorer, OracleScorer, ScorerList
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import CheckpointError
from ttcfast.spec import ARMWeights, StateSpec, TTCConfig
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.budget import Budget
from ttcfast.ttc.inference import TTCGreedy
from ttcfast.ttc.memory import bytes_per_candidate
from ttcfast.ttc.models import as_source
from ttcfast.ttc.resume import settings_of


class Killed(Exception):
    pass


class Dies:
    """A score that ends the process, so to speak, at its n-th call."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self, x_t, cand_tp1, *, context):
        self.left -= 1
        if self.left < 0:
            raise Killed
        return cand_tp1[:, :, 0, -1, -1]


@pytest.mark.filterwarnings("ignore:step")
@pytest.mark.parametrize("case", ["beam", "particle", "budget", "deaths"])
def test_a_killed_rollout_goes_on_to_the_same_trajectory(case, tmp_path):
    fm, x0 = brittle() if case == "deaths" else drop_surrogate(history=2), euler_state(6)
    x0 = x0 if case == "deaths" else x0.view(3, 2, 4, 8, 8)
    budget = Budget(100) if case == "budget" else None
    cfg = TTCConfig(branching_factor=4, beam_width=2, approach="particle" if case == "particle" else "beam", max_resample=0)

    def roll(calls, folder, steps=6):
        return TTCBeam(fm, Dies(calls), cfg).rollout(x0, steps, return_info=True, budget=budget, resume=folder)

    whole = roll(10**6, None)
    if case == "deaths":
        assert whole.frozen.any() and not whole.frozen.all()
    for _ in range(3):  # killed in step 1, then a step later, and again; particles have the deterministic step apart
        with pytest.raises(Killed):
            roll(2 if case == "particle" else 1, tmp_path)
    resumed = roll(10**6, tmp_path)
    for name in ("trajectory", "scores", "chosen", "fallbacks", "frozen", "nonfinite"):
        torch.testing.assert_close(getattr(resumed, name), getattr(whole, name), rtol=0, atol=0, equal_nan=True)
    assert (resumed.nfe, resumed.copies, resumed.searched) == (whole.nfe, whole.copies, whole.searched)
    finished = roll(0, tmp_path)  # nothing is left to do
    torch.testing.assert_close(finished.trajectory, whole.trajectory, rtol=0, atol=0, equal_nan=True)
    assert [p.name for p in tmp_path.iterdir()] == ["rollout.safetensors"]


def test_a_folder_of_another_rollout_is_refused_with_the_keys_that_differ(tmp_path):
    x0, cfg = euler_state(1), {"branching_factor": 3, "beam_width": 2, "approach": "beam"}
    TTCBeam(drop_surrogate(), last_cell, TTCConfig(**cfg)).rollout(x0, 2, resume=tmp_path)
    changed = TTCBeam(drop_surrogate(), last_cell, TTCConfig(**{**cfg, "seed": 3, "lookahead": 1}))
    with pytest.raises(CheckpointError, match=r"another configuration: lookahead is 1, there 0; seed is 3, there 0; give another folder"):
        changed.rollout(x0, 2, resume=tmp_path)
    other = drop_surrogate()
    other.model.head.bias.data += 1
    with pytest.raises(CheckpointError, match=r": T is 3, there 2; x0 is .*; model.weights is '"):
        TTCBeam(other, last_cell, TTCConfig(**cfg)).rollout(x0 + 1, 3, resume=tmp_path)
    (tmp_path / "rollout.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="is damaged"):
        TTCBeam(drop_surrogate(), last_cell, TTCConfig(**cfg)).rollout(x0, 2, resume=tmp_path)


def arm(w_mass=1.0, **options):
    return ARMScorer(ARMWeights(w_mass=w_mass), 1.0, **{"momentum": "sum", "scale": "absolute", **options})


def scaled(factor):
    return lambda x_t, cand_tp1: factor * cand_tp1[:, 0, 0, 0]


def networked(weight):
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(weight)
    return lambda x_t, cand_tp1: net(cand_tp1[:, 0, 0, :1])[:, 0]


class Weighed:
    """A plain object that scores, with a private setting and a public count."""

    def __init__(self, weight=1.0):
        self._weight, self.calls = weight, []

    def __call__(self, x_t, cand_tp1):
        self.calls.append(len(cand_tp1))
        return self._weight * cand_tp1[:, 0, 0, 0]


OTHER_SCORERS = {  # name: (scorer of the folder, one that differs in a setting, how the error names it)
    "weight": (arm(), arm(5.0), r"scorer.weights.w_mass is 5.0, there 1.0;"),
    "scale": (arm(), arm(scale="relative", momentum="norm"), r"scorer.momentum is 'norm', there 'sum'; scorer.scale is 'relative', there"),
    "list": (ScorerList({"a": arm()}), ScorerList({"a": arm()}, [2.0]), r"scorer.weights.a is 2.0, there 1.0;"),
    "zscore": (ScorerList({"a": arm()}), ScorerList({"a": arm()}, zscore=True), r"scorer.needs_group is True, .*; scorer.zscore is True"),
    "inner": (ScorerList({"a": arm()}), ScorerList({"a": arm(3.0)}), r"scorer.scorers.a.weights.w_mass is 3.0, there 1.0"),
    "function": (last_cell, lambda x_t, c: -c[:, 0, 0, 0], r"scorer._function is '.*lambda> \w+', there '.*last_cell \w+';"),
    "closure": (scaled(1.0), scaled(2.0), r"scorer._function.factor is 2.0, there 1.0;"),
    "network": (networked(1.0), networked(2.0), r"scorer._function.net.weights is '\w+', there '\w+';"),
    "object": (Weighed(), Weighed(2.0), r"scorer._function._weight is 2.0, there 1.0;"),
    "spec": (arm(), arm(spec=StateSpec.euler2d(gamma=torch.tensor(1.3))), r"scorer.spec.gamma is 'torch.float32 \(\) \w+', there 1.4"),
    "kind": (arm(), last_cell, r"scorer is '_FunctionScorer', there 'ARMScorer'; .*; and \d+ more; give another folder"),
}


@pytest.mark.parametrize("case", OTHER_SCORERS)
def test_a_scorer_of_other_settings_is_refused(case, tmp_path):
    ours, theirs, message = OTHER_SCORERS[case]
    x0, cfg = euler_state(1), TTCConfig(branching_factor=3, approach="beam")
    TTCBeam(drop_surrogate(), ours, cfg).rollout(x0, 2, resume=tmp_path)
    with pytest.raises(CheckpointError, match=f"another configuration: .*{message}"):
        TTCBeam(drop_surrogate(), theirs, cfg).rollout(x0, 2, resume=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stochastic": {"input_eps": 0.01}}, r"model.stochastic.input_eps is 0.01, there 0.0"),
        ({"unpack": lambda out: out}, r"model.unpack is '.*<lambda> \w+', there None"),
        ({"dtype": torch.bfloat16}, r"model._candidates.dtype is 'torch.bfloat16', there None"),
    ],
)
def test_a_surrogate_of_other_settings_is_refused(options, message, tmp_path):
    x0, cfg = euler_state(1), TTCConfig(branching_factor=3, approach="beam")
    TTCBeam(drop_surrogate(), last_cell, cfg).rollout(x0, 2, resume=tmp_path)
    with pytest.raises(CheckpointError, match=message):
        TTCBeam(drop_surrogate(**options), last_cell, cfg).rollout(x0, 2, resume=tmp_path)


def test_another_tie_breaker_and_duplicates_are_refused(tmp_path):
    x0, cfg = euler_state(1), TTCConfig(branching_factor=3, approach="beam")
    TTCBeam(drop_surrogate(), last_cell, cfg).rollout(x0, 2, resume=tmp_path)
    with pytest.raises(CheckpointError, match=r"configuration: tie_breaker is 'ARMScorer', there None; .*and \d+ more"):
        TTCBeam(drop_surrogate(), last_cell, cfg, tie_breaker=arm()).rollout(x0, 2, resume=tmp_path)
    with pytest.raises(CheckpointError, match=r"configuration: drop_duplicates is True, there False; give"):
        TTCBeam(drop_surrogate(), last_cell, cfg, drop_duplicates=True).rollout(x0, 2, resume=tmp_path)


SCORERS = {
    "arm": arm,
    "list": lambda: ScorerList([arm(2.0), last_cell], zscore=True),
    "oracle": lambda: OracleScorer(euler_state(9).view(3, 3, 4, 8, 8), scale=2.0),
    "closure": lambda: scaled(3.0),
    "object": Weighed,
}


@pytest.mark.parametrize("name", SCORERS)
def test_use_makes_no_scorer_another(name, tmp_path):
    """Caches are filled and calls counted by the first rollout; the folder is open to used and to fresh objects."""
    fm, scorer, x0, cfg = drop_surrogate(), SCORERS[name](), euler_state(2), TTCConfig(branching_factor=3, approach="beam")
    rolled = TTCBeam(fm, scorer, cfg).rollout(x0, 2, resume=tmp_path / "fresh first")
    for place in ("fresh first", "used first"):
        assert torch.equal(TTCBeam(fm, scorer, cfg).rollout(x0, 2, resume=tmp_path / place), rolled)
        assert torch.equal(TTCBeam(drop_surrogate(), SCORERS[name](), cfg).rollout(x0, 2, resume=tmp_path / place), rolled)


DESCRIBE = """
import json, tests.ttc.test_resume as made
print(json.dumps({name: made.settings_of("scorer", make()) for name, make in made.SCORERS.items()} | {"fm": made.described_surrogate()}))
"""


def described_surrogate():
    stochastic = {"dropout_after": ["lift"]}
    return settings_of("model", drop_surrogate(stochastic=stochastic, unpack=lambda out: out if len(out) in {"a", "b", "c"} else out[:]))


def test_equal_objects_of_two_processes_have_equal_settings():
    theirs = json.loads(subprocess.run([sys.executable, "-c", DESCRIBE], check=True, stdout=subprocess.PIPE, text=True).stdout)
    ours = {name: settings_of("scorer", make()) for name, make in SCORERS.items()} | {"fm": described_surrogate()}
    assert json.loads(json.dumps(ours)) == theirs


def test_sequences_and_objects_within_one_another_are_described():
    many = list(range(100))
    assert settings_of("s", many)["s"] != settings_of("s", [*many[:-1], 0])["s"]
    itself = {"inner": [1.5, None]}
    itself["outer"] = itself
    assert settings_of("s", itself) == {
        "s": "dict of 2",
        "s.inner": "list of 2",
        "s.inner.0": 1.5,
        "s.inner.1": None,
        "s.outer": "the same as dict",
    }


class Hungry:
    """A score that takes so many bytes for each candidate while it works."""

    def __init__(self, each):
        self.each = each

    def __call__(self, x_t, cand_tp1, *, context):
        waste = torch.ones(cand_tp1.shape[1], self.each // 4)
        return cand_tp1[:, :, 0, 0, 0] + waste.sum() * 0


@pytest.mark.parametrize("each", [200_000, 2_000_000])
def test_a_memory_budget_decides_by_what_is_measured(each):
    controller = TTCBeam(drop_surrogate(), Hungry(each), TTCConfig(branching_factor=300, memory_budget=16 * each, approach="beam"))
    x0, ids = euler_state(1), torch.tensor([0])
    measured = bytes_per_candidate(as_source(controller.fm, controller.cfg), controller.scorer, controller.cfg, x0, ids)
    assert 0.95 * each < measured < 1.2 * each + 50_000
    size = controller._chunks(x0, ids)[0].size
    assert size in (8, 16)
    with pytest.raises(
        ValueError, match=r"memory_budget is 65536 bytes and generating and scoring one candidate takes \d{6,7}; give at least"
    ):
        TTCBeam(drop_surrogate(), Hungry(each), TTCConfig(memory_budget=65536)).rollout(x0, 1)


@pytest.mark.parametrize("damage, told", [("missing", "has no 'state.window'"), ("changed", "is damaged")])
def test_a_state_that_is_not_what_was_written_is_one_error(tmp_path, damage, told):
    cfg, x0 = TTCConfig(branching_factor=4, beam_width=2, approach="beam"), euler_state(2)
    with pytest.raises(Killed):
        TTCBeam(drop_surrogate(), Dies(2), cfg).rollout(x0, 3, resume=tmp_path)
    path = tmp_path / "rollout.safetensors"
    if damage == "missing":
        tensors, meta = checkpoints.load(path)
        del tensors["state.window"]
        checkpoints.save(path, tensors, meta)
    else:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"rollout.safetensors .*{told}"):
        TTCBeam(drop_surrogate(), Dies(10**6), cfg).rollout(x0, 3, resume=tmp_path)


@pytest.mark.filterwarnings("ignore:step")
@pytest.mark.parametrize("select", ["argmax", "softmax_mean"])
def test_a_killed_greedy_rollout_goes_on_too(select, tmp_path):
    fm = brittle()
    cfg = TTCConfig(branching_factor=4, max_resample=0, select=select)

    def roll(calls, folder):
        return TTCGreedy(fm, Dies(calls), cfg).rollout(euler_state(6), 4, return_info=True, resume=folder)

    whole = roll(10**6, None)
    assert whole.frozen.any() and not whole.frozen.all()
    with pytest.raises(Killed):
        roll(2, tmp_path)
    resumed = roll(10**6, tmp_path)
    for name in ("trajectory", "scores", "chosen", "weights", "fallbacks", "frozen", "nonfinite"):
        ours, theirs = getattr(resumed, name), getattr(whole, name)
        assert (ours is None and theirs is None) or torch.equal(ours.nan_to_num(9.0), theirs.nan_to_num(9.0)), name
    assert (resumed.nfe, resumed.searched) == (whole.nfe, whole.searched)
    with pytest.raises(CheckpointError, match="another configuration: approach is 'beam', there 'greedy'"):
        TTCBeam(fm, Dies(0), TTCConfig(branching_factor=4, max_resample=0, approach="beam")).rollout(euler_state(6), 4, resume=tmp_path)


def test_a_module_with_weights_of_its_own_still_counts_by_its_parameters():
    class Weighted(torch.nn.Linear):
        def __init__(self, value, *weights):
            super().__init__(1, 1)
            torch.nn.init.constant_(self.weight, value)
            torch.nn.init.zeros_(self.bias)
            self.weights, self.layers = list(weights), 3

    one, same, other, weighed = (settings_of("scorer", Weighted(*given)) for given in ((1.0, 2), (1.0, 2), (5.0, 2), (1.0, 3)))
    assert one == same
    assert [name for name in one if one[name] != other[name]] == ["scorer.weights in it"]
    assert [name for name in one if one[name] != weighed[name]] == ["scorer.weights.0"]
