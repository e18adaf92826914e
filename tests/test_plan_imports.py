"""Every name at every module path that the plans print, and at those of the public interface, imports.

The names that a later version brings (the process reward model, the beam) join this list with it.
"""

import importlib
import inspect

import pytest

TTC_PLAN = {  # section by section, with ``ttcfast.`` before the module
    "stochastic_sampling.dropout_wrap": ["enable_mc_dropout"],
    "stochastic_sampling.latent_noise": ["inject_latent_noise"],
    "stochastic_sampling.input_perturb": ["perturb_state"],
    "rewards.arm": [
        "ARMWeights",
        "integral",
        "mass_conservation_reward",
        "momentum_conservation_reward",
        "energy_conservation_reward",
        "bc_violation_reward",
        "compute_pressure",
        "positivity_reward",
        "arm_score",
    ],
    "ttc.inference": ["TTCConfig", "TTCGreedy"],
    "metrics.sample_gain": ["sample_gain"],
    "metrics.pde_conservation": ["conservation_drift"],
    "metrics.mse": ["rollout_mse"],
    "core.base_fm": ["temp_seed", "BaseFM"],
    "rewards.common": ["Scorer", "ARMScorer", "PRMScorer"],
    "rewards.prm.model": ["PRM"],
    "rewards.prm.train": ["triplet_margin_loss", "train_prm"],
    "rewards.prm.dataset": ["PRMTripletSet"],
    "cli.build_prm_data": ["run"],
}
API = {
    "spec": ["StateSpec", "ARMWeights", "StochasticConfig", "TTCConfig", "Key"],
    "physics": ["EulerSolver", "initial_conditions"],
    "ops": ["arm", "ArmScores", "info"],
    "core.base_fm": ["BaseFM", "temp_seed", "Surrogate"],
    "stochastic_sampling": ["enable_mc_dropout", "inject_latent_noise", "perturb_state"],
    "rewards.common": ["Scorer", "ARMScorer", "OracleScorer", "PRMScorer", "ScorerList"],
    "rewards.prm.dataset": ["build_triplets", "PRMTripletSet"],
    "ttc.inference": ["TTCConfig", "TTCGreedy"],
    "ttc.beam": ["TTCBeam"],
    "metrics": [
        "rollout_mse",
        "nrmse",
        "vrmse",
        "relative_l1",
        "conservation_drift",
        "sample_gain",
        "fraction_improved",
        "calibration",
    ],
}
WORLD_MODELS = {  # the sections on configuration and on files, and what docs/world-models.md prints
    "pwm.models.base": ["BaseWorldModel"],
    "pwm.models.world_model": ["MLPWorldModel", "ResidualWorldModel"],
    "pwm.models.flow_world_model": ["FlowWorldModel"],
    "pwm.algorithms.dynamics_loss": ["MLPDynamicsLoss", "FlowMatchingDynamicsLoss", "Heun", "Euler"],
    "pwm.algorithms.pwm": ["PWM"],
    "pwm.utils.metrics": ["esnr", "ESNR", "ESNRMeter", "parameter_parity"],
    "integrators": ["Heun", "Euler", "integrate"],
}
SHORT = [
    *("ARMScorer", "PRMScorer", "TTCConfig", "TTCGreedy", "TTCBeam", "StateSpec", "info", "ops", "physics", "integrate", "esnr"),
    "__version__",
]
SIGNATURES = {  # the sketch's arguments come first, in its order and under its names
    "stochastic_sampling.dropout_wrap.enable_mc_dropout": ["model"],
    "stochastic_sampling.latent_noise.inject_latent_noise": ["latent", "sigma"],
    "stochastic_sampling.input_perturb.perturb_state": ["x", "eps"],
    "rewards.arm.integral": ["field", "dxdy"],
    "rewards.common.PRMScorer": ["prm_ckpt", "in_ch"],
    "rewards.prm.model.PRM": ["in_ch", "width", "depth"],
    "rewards.prm.train.triplet_margin_loss": ["s_best", "s_med", "s_worst", "margin"],
    "rewards.prm.train.train_prm": ["manifest_paths", "in_ch", "epochs", "lr", "margin", "bs"],
    "rewards.arm.mass_conservation_reward": ["state_t", "cand_tp1", "dxdy"],
    "rewards.arm.momentum_conservation_reward": ["state_t", "cand_tp1", "dxdy"],
    "rewards.arm.energy_conservation_reward": ["state_t", "cand_tp1", "dxdy"],
    "rewards.arm.bc_violation_reward": ["cand_tp1", "bc_mask"],
    "rewards.arm.compute_pressure": ["state", "gamma"],
    "rewards.arm.positivity_reward": ["cand_tp1"],
    "rewards.arm.arm_score": ["state_t", "cand_tp1", "dxdy", "bc_mask", "w"],
    "rewards.prm.dataset.PRMTripletSet": ["manifest_paths"],
    "rewards.common.ARMScorer": ["weights", "dxdy", "bc_mask"],
    "rewards.common.Scorer.score": ["self", "x_t", "cand_tp1"],
    "core.base_fm.temp_seed": ["seed"],
    "core.base_fm.BaseFM.sample_next": ["self", "x_t", "seed", "multi"],
    "ttc.inference.TTCGreedy": ["fm", "scorer", "cfg"],
    "ttc.inference.TTCGreedy.rollout": ["self", "x0", "T"],
}


@pytest.mark.parametrize("module, name", [(m, n) for table in (TTC_PLAN, API, WORLD_MODELS) for m, names in table.items() for n in names])
def test_the_name_is_where_the_plan_or_the_readme_puts_it(module, name):
    assert getattr(importlib.import_module(f"ttcfast.{module}"), name) is not None


@pytest.mark.parametrize("name", SHORT)
def test_the_short_way(name):
    ttcfast = importlib.import_module("ttcfast")
    assert getattr(ttcfast, name) is not None
    assert name in dir(ttcfast)


@pytest.mark.parametrize("path, names", SIGNATURES.items())
def test_the_sketchs_arguments_come_first(path, names):
    package, _, rest = path.partition(".")
    middle, *attributes = rest.split(".")
    found = importlib.import_module(f"ttcfast.{package}.{middle}")
    for attribute in attributes:
        found = getattr(found, attribute)
    assert list(inspect.signature(found).parameters)[: len(names)] == names


def test_an_unknown_short_name_says_what_there_is():
    ttcfast = importlib.import_module("ttcfast")
    with pytest.raises(AttributeError, match=r"module 'ttcfast' has no attribute 'TTCGready'; it has .*TTCGreedy"):
        _ = ttcfast.TTCGready


def test_the_sketchs_code_runs_as_printed():
    import torch

    from ttcfast.core.base_fm import BaseFM
    from ttcfast.rewards.arm import ARMWeights, arm_score
    from ttcfast.rewards.common import ARMScorer
    from ttcfast.stochastic_sampling.dropout_wrap import enable_mc_dropout
    from ttcfast.ttc.inference import TTCConfig, TTCGreedy

    class FM(BaseFM):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Dropout(0.1))

        def forward(self, x_t):
            return x_t + 0.01 * self.net(x_t)

    fm = enable_mc_dropout(FM().eval())
    x0 = torch.rand(4, 8, 8) * 0.1 + torch.tensor([1.0, 0.0, 0.0, 2.5]).reshape(4, 1, 1)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[0] = True
    scorer = ARMScorer(ARMWeights(), 1 / 64, mask, momentum="sum", scale="absolute")
    cands = fm.sample_next(x0.expand(5, 4, 8, 8), seed=0, multi=True)
    torch.testing.assert_close(scorer(x0.expand_as(cands), cands), arm_score(x0.expand_as(cands), cands, 1 / 64, mask, ARMWeights()))
    trajectory = TTCGreedy(fm, scorer, TTCConfig(branching_factor=3)).rollout(x0, 2)
    assert trajectory.shape == (4, 3, 8, 8) and trajectory.isfinite().all()
