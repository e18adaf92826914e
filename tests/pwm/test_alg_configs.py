"""The configurations under ttcfast/configs/alg: composed by Hydra, built by PWM.from_config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ttcfast.integrators import Euler, Heun
from ttcfast.pwm.algorithms import PWM, FlowMatchingDynamicsLoss, MLPDynamicsLoss
from ttcfast.pwm.evaluation.parity import ParityError
from ttcfast.pwm.models import SIZES, FlowWorldModel, MLPWorldModel, ResidualWorldModel
from ttcfast.runtime.errors import ArgumentError

CONFIGS = Path(__file__).resolve().parents[2] / "ttcfast" / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "alg").glob("*.yaml"))
KINDS = {"flow": (FlowWorldModel, FlowMatchingDynamicsLoss), "residual": (ResidualWorldModel, MLPDynamicsLoss)}
MT30 = {"observation_dim": 24, "action_dim": 6, "tasks": [f"task-{i}" for i in range(30)]}


def alg(name: str, *overrides: str) -> dict:
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        config = compose(f"alg/{name}", list(overrides))
    return OmegaConf.to_container(config.alg, resolve=True)


def agent(name: str, *overrides: str, **sizes) -> PWM:
    with torch.device("meta"):
        return PWM.from_config(alg(name, *overrides), **(sizes or MT30))


def test_the_sizes_of_the_issue_are_there():
    assert {"pwm_5M", "pwm_19M", "pwm_48M", "pwm_317M", "pwm_48M_flow", "pwm_cpu", "pwm_cpu_flow"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_builds_the_pair_it_names(name):
    made = agent(name, "alg.parity.on_violation=abort")
    size, _, suffix = name.removeprefix("pwm_").partition("_")
    model, loss = KINDS.get(suffix, (MLPWorldModel, MLPDynamicsLoss))
    assert type(made.model) is model and type(made.dynamics_loss) is loss
    assert made.use_flow_dynamics == (suffix == "flow")
    with torch.device("meta"):
        same = model.of_size(size, 24, 6, multitask=True, tasks=MT30["tasks"])
    assert made.model.total_params == same.total_params
    assert {k: v for k, v in made.model.arguments.items() if k in SIZES[size]} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in SIZES[size].items()
    }
    assert (made.parity is None) == (model is MLPWorldModel)


def test_the_switch_selects_the_pair():
    flow = agent("pwm_cpu", "alg.use_flow_dynamics=true", "alg.integrator.type=euler", "alg.integrator.substeps=3")
    assert type(flow.model) is FlowWorldModel and flow.use_flow_dynamics and flow.model.integrator == Euler(3)
    back = agent("pwm_cpu_flow", "alg.use_flow_dynamics=false")
    assert type(back.model) is MLPWorldModel and type(back.dynamics_loss) is MLPDynamicsLoss
    assert type(agent("pwm_cpu_residual", "alg.use_flow_dynamics=false").model) is ResidualWorldModel
    assert type(agent("pwm_cpu_flow", "alg.use_flow_dynamics=true").model) is FlowWorldModel


def test_the_integrator_reaches_model_and_loss():
    with pytest.warns(UserWarning, match="midpoint"):
        made = agent("pwm_cpu_flow", "alg.integrator.substeps=4", "alg.integrator.tau_sampling=midpoint")
    assert made.model.integrator == Heun(4) and made.dynamics_loss.tau_sampling == "midpoint"
    assert made.model.evaluations == 8


def test_one_task_makes_a_model_without_embedding():
    made = PWM.from_config(alg("pwm_cpu_flow"), observation_dim=5, action_dim=1, tasks=["cartpole-swingup"])
    assert made.model.task_embedding is None
    obs, act, rew = torch.randn(4, 8, 5), torch.rand(3, 8, 1), torch.rand(3, 8, 1)
    assert made.update_wm(obs, act, rew)["updated"] == 1


def test_parity_aborts_when_asked():
    with pytest.raises(ParityError, match="more than the tolerance"):
        agent("pwm_5M_flow", "alg.parity.tolerance=0.0001", "alg.parity.on_violation=abort")


@pytest.mark.parametrize(
    ("message", "overrides"),
    [
        ("alg.model.latnet_dim is unknown; MLPWorldModel takes observation_dim", ["+alg.model.latnet_dim=3"]),
        ("alg.wm.learning_rate is unknown; PWM takes", ["+alg.wm.learning_rate=3"]),
        ("alg.sanity.max is unknown", ["+alg.sanity.max=3"]),
        ("alg.model._target_ is 'ttcfast.pwm.models.Nothing', which is no", ["alg.model._target_=ttcfast.pwm.models.Nothing"]),
        ("alg.model._target_ is 'torch.nn.Linear', which is no BaseWorldModel", ["alg.model._target_=torch.nn.Linear"]),
        ("alg.dynamics_loss._target_ is None; give the full path", ["alg.dynamics_loss._target_=null"]),
        ("alg.use_flow_dynamics is 'maybe'", ["alg.use_flow_dynamics=maybe"]),
        ("substeps is 0", ["alg.use_flow_dynamics=true", "alg.integrator.substeps=0"]),
        ("method is 'rk4'", ["alg.use_flow_dynamics=true", "alg.integrator.type=rk4"]),
        ("latent_dim is 60, which SimNorm", ["alg.model.latent_dim=60"]),
    ],
)
def test_wrong_configuration_gives_one_clear_line(message, overrides):
    with pytest.raises(ValueError, match=message) as caught:
        agent("pwm_cpu", *overrides)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ArgumentError) or "alg" not in message
