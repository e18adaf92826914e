import pytest
import torch
from torch import Tensor

from tests.surrogates import DropNet, Foreign, drop_surrogate, euler_state, vit_surrogate
from ttcfast.core.base_fm import Surrogate
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.ttc.candidates import Chunks
from ttcfast.ttc.inference import TTCGreedy
from ttcfast.ttc.models import as_source
from ttcfast.ttc.paths import Beams


def mean_density(x_t, cand_tp1):
    """A score in which every cell has a say."""
    return cand_tp1[:, 0].double().square().flatten(1).sum(1)


def scores(n=3, problems=None, **options):
    cfg = TTCConfig(**options)
    x0 = euler_state(4)[torch.arange(n) if problems is None else torch.tensor(problems)]
    ids = None if problems is None else torch.tensor(problems)
    return TTCGreedy(vit_surrogate(), mean_density, cfg).rollout(x0, 2, return_info=True, problem_ids=ids)


def test_a_candidate_is_the_same_to_the_last_bit_whichever_chunk_it_is_in():
    # four problems in blocks of four and 13 candidates three at a time: whole chunks, and one that is filled up
    whole = scores(4, branching_factor=13, chunk_size=12)
    for b in (12, 11, 5):
        part = scores(4, branching_factor=b, chunk_size=12)
        assert torch.equal(part.scores[:, 0], whole.scores[:, 0, :b])
    assert (whole.scores[:, 0, 1:].std(1) > 0).all()
    # problems of a block that is filled up, and in another order
    turned = scores(problems=[3, 1, 0], branching_factor=5, chunk_size=2)
    straight = scores(problems=[0, 1, 2, 3], branching_factor=5, chunk_size=2)
    assert torch.equal(turned.scores[:, 0], straight.scores[[3, 1, 0], 0])


class Fails(DropNet):
    """Has no finite next state for a state of large density."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, :1, :1, :1] > 5, torch.nan, super().forward(x))


@pytest.mark.parametrize("needs_group", [False, True])
def test_all_calls_of_the_model_have_one_size_also_when_problems_drop_out(needs_group):
    fm, x0 = Surrogate(Fails(), StateSpec.euler2d()), euler_state(5)
    x0[0] = 10.0
    controller = TTCGreedy(fm, mean_density, TTCConfig(branching_factor=6, chunk_size=14, max_resample=1))
    controller.scorer.needs_group = needs_group
    with pytest.warns(RuntimeWarning, match=r"no finite next state for problems \[0\]"):
        r = controller.rollout(x0, 3, return_info=True)
    assert r.frozen[0].all() and not r.frozen[1:].any()
    # two problems at a time with all candidates, drawn again without candidate 0; or five with two candidates, drawn again alike
    assert set(fm.model.calls) == ({2 * 6, 2 * 5} if needs_group else {5 * 2})
    # six candidates of five problems and problem 0 drawn again without candidate 0, then those of four; what fills up is not counted
    assert r.nfe == 5 * 6 + 5 + 2 * 4 * 6


def test_without_a_limit_nothing_is_drawn_in_vain():
    fm = drop_surrogate()
    fm.model.calls.clear()
    r = TTCGreedy(fm, mean_density, TTCConfig(branching_factor=4)).rollout(euler_state(3), 2, return_info=True)
    assert fm.model.calls[-2:] == [12, 12] and r.nfe == 24  # before that the model is traced


@pytest.mark.parametrize("needs_group", [False, True])
@pytest.mark.parametrize("size", [None, 1, 4, 7, 20])
def test_the_deterministic_step_is_one_of_a_chunk_and_the_choices_are_those_of_a_call_of_its_own(size, needs_group):
    def rolled(joint: bool):
        fm = drop_surrogate()
        controller = TTCGreedy(fm, mean_density, TTCConfig(branching_factor=6, chunk_size=size))
        controller.scorer.needs_group, controller._source.joint = needs_group, joint
        result = controller.rollout(euler_state(3), 2, return_info=True)
        fm.model.calls.clear()
        controller.step_from(result.trajectory[:, -1], step=2)
        return result, fm.model.calls

    if needs_group and size is not None and size < 6:
        return
    (ours, joint), (theirs, apart) = rolled(True), rolled(False)
    assert torch.equal(ours.chosen, theirs.chosen) and ours.nfe == theirs.nfe == 2 * 3 * 6
    for name in ("trajectory", "scores"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    assert size is None or max(joint) <= size
    assert len(joint) < len(apart) or size in (1, 4)  # which hold one candidate of each problem


def test_a_model_that_draws_in_its_own_way_is_given_what_was_asked_for():
    fm = Foreign()
    r = TTCGreedy(fm, mean_density, TTCConfig(branching_factor=5, chunk_size=6)).rollout(euler_state(3), 1, return_info=True)
    assert fm.batches == [6, 6, 3] and r.nfe == 15


@pytest.mark.parametrize("whole_groups", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_chunks_of_all_ranks_are_those_of_one(whole_groups, ranks):
    """Every candidate of every problem is drawn by one rank, all of a problem by the same where the scorer compares them."""
    cfg, x0, ids = TTCConfig(branching_factor=7), euler_state(3), torch.arange(3)
    fm = drop_surrogate()
    found = torch.zeros(3, 7, dtype=torch.int64)
    for rank in range(ranks):
        beams = Beams(x0, ids, torch.zeros_like(ids), ids, torch.zeros(3).double())
        chunks = Chunks(as_source(fm, cfg), cfg, 3, include_deterministic=True, whole_groups=whole_groups, share=(rank, ranks))
        for rows, start, drawn in chunks.of_step(beams, 0, 0):
            assert not whole_groups or drawn.shape[1] == 7
            found[rows, start : start + drawn.shape[1]] += 1
    assert (found == 1).all()
