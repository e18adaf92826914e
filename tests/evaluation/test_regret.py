import copy

import pytest
import torch

from tests.scorers import last_cell
from tests.surrogates import drop_surrogate, euler_state
from ttcfast.core.base_fm import Surrogate
from ttcfast.evaluation.regret import MOST_RELATIVE_REGRET, ChoiceRegret, choice_regret
from ttcfast.spec import TTCConfig
from ttcfast.ttc.inference import TTCGreedy

CFG = TTCConfig(branching_factor=6, seed=4)


def states(n=2, steps=4):
    return TTCGreedy(drop_surrogate(), last_cell, CFG).rollout(euler_state(n), steps)[:, :steps]


def test_the_same_path_has_no_regret_and_its_choices_are_the_rollouts():
    fm = drop_surrogate()
    result = TTCGreedy(fm, last_cell, CFG).rollout(euler_state(2), 4, return_info=True)
    regret = choice_regret(fm, fm, last_cell, result.trajectory[:, :4], CFG)
    assert regret.agree.all() and regret.worst == regret.mean == 0
    assert torch.equal(regret.spread, result.scores.amax(2) - result.scores.amin(2))


def test_regret_is_counted_in_the_references_scores():
    fm = drop_surrogate()

    class Worst(Surrogate):
        """Moves every candidate to the other side of the mean, so that the best looks worst."""

        def candidates(self, x, ids, **options):
            return 2 * x.unsqueeze(1) - super().candidates(x, ids, **options)

    worst = Worst(copy.deepcopy(fm.model), fm.spec, predicts="delta")
    cfg = TTCConfig(branching_factor=6, seed=4, include_deterministic=False)
    regret = choice_regret(fm, worst, last_cell, states(), cfg)
    assert not regret.agree.any()
    torch.testing.assert_close(regret.relative, torch.ones(2, 4, dtype=torch.float64))
    assert "same choice in 0.0% of 8 groups; regret 100.000% of the spread on average, 100.000% at worst" in str(regret)


def test_bfloat16_candidates_are_chosen_nearly_as_well():
    fm = drop_surrogate(scale=1.0)
    regret = choice_regret(fm, fm.variant(dtype=torch.bfloat16), last_cell, states(), CFG)
    assert 0 <= regret.worst <= MOST_RELATIVE_REGRET
    different = choice_regret(fm, drop_surrogate(scale=1.0, p=0.6), last_cell, states(), CFG)
    assert different.worst > 0.05  # other noise, other choices


def test_what_cannot_be_compared_is_left_out_and_what_is_rejected_costs_infinitely():
    nan, inf = float("nan"), float("inf")
    values = ChoiceRegret(torch.tensor([[0.0, 0.5, nan]]), torch.tensor([[0.0, 2.0, nan]]), torch.tensor([[True, False, False]]))
    assert values.worst == 0.25 and values.mean == 0.125
    assert ChoiceRegret(torch.tensor([[inf]]), torch.tensor([[2.0]]), torch.tensor([[False]])).worst == inf
    fm = drop_surrogate()
    broken = Surrogate(copy.deepcopy(fm.model), fm.spec, predicts="delta")
    with torch.no_grad():
        broken.model.head.bias.fill_(nan)
    regret = choice_regret(fm, broken, last_cell, states(), CFG)
    assert regret.regret.isnan().all() and not regret.agree.any() and regret.worst != regret.worst


def test_a_step_can_be_taken_from_any_state():
    fm, x = drop_surrogate(), euler_state(3)
    controller = TTCGreedy(fm, last_cell, CFG)
    steps = list(controller.rollout_iter(x, 3))
    for before, out in zip([x, *(s.state for s in steps)], steps):
        again = controller.step_from(before, step=out.step)
        assert torch.equal(again.state, out.state) and torch.equal(again.scores, out.scores)
    with pytest.raises(ValueError, match="step is -1"):
        controller.step_from(x, step=-1)
