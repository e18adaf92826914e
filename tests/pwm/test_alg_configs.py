"""The configurations under ttcfast/configs/alg: composed by Hydra, built by PWM.from_config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ttcfast.integrators import Euler, Heun
from ttcfast.pwm.algorithms import PWM, FlowMatchingDynamicsLoss, MLPDynamicsLoss
from ttcfast.pwm.arms import Arm
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


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("pwm_control")])
def test_every_configuration_builds_the_pair_it_names(name):
    made = agent(name, "alg.parity.on_violation=abort")
    size, _, suffix = name.removeprefix("pwm_").partition("_")
    model, loss = KINDS.get(suffix, (MLPWorldModel, MLPDynamicsLoss))
    assert type(made.model) is model and type(made.dynamics_loss) is loss
    assert made.use_flow_dynamics == (suffix == "flow")
    with torch.device("meta"):
        same, base = (kind.of_size(size, 24, 6, multitask=True, tasks=MT30["tasks"]) for kind in (model, MLPWorldModel))
    assert made.model.total_params == same.total_params
    assert {k: v for k, v in made.model.arguments.items() if k in SIZES[size]} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in SIZES[size].items()
    }
    assert (made.parity.base, made.parity.model) == (base.total_params, same.total_params)
    assert made.weights == (20.0, 0.1), "TD-MPC2's"


@pytest.mark.parametrize(("name", "latent"), [("pwm_control", 16), ("pwm_control_identity", 24)])
@pytest.mark.parametrize("arm", ["mlp", "residual", "heun2"])
def test_control_has_plain_latents_of_standardised_observations(name, latent, arm):
    with torch.device("meta"):
        made = PWM.from_config(Arm(arm).configure(alg(name)), **{**MT30, "tasks": None})
    model = made.model
    assert (model.latent_dim, model.group, made.weights) == (latent, 0, (20.0, 1.0)) and model.observation_std is not None
    assert (model.encoder_network is None) == (name == "pwm_control_identity") and abs(made.parity.dynamics_gap) < 0.02


def test_the_switch_selects_the_pair():
    flow = agent("pwm_cpu", "alg.use_flow_dynamics=true", "alg.integrator.type=euler", "alg.integrator.substeps=3")
    assert type(flow.model) is FlowWorldModel and flow.use_flow_dynamics and flow.model.integrator == Euler(3)
    back = agent("pwm_cpu_flow", "alg.use_flow_dynamics=false")
    assert type(back.model) is MLPWorldModel and type(back.dynamics_loss) is MLPDynamicsLoss
    assert type(agent("pwm_cpu_residual", "alg.use_flow_dynamics=false").model) is ResidualWorldModel
    assert type(agent("pwm_cpu_flow", "alg.use_flow_dynamics=true").model) is FlowWorldModel


PAIRS = [
    # switch, model and loss as named, model and loss as built
    (True, "flow", "mlp", "flow", "flow"),
    (True, "residual", "flow", "flow", "flow"),
    (True, "mlp", None, "flow", "flow"),
    (False, "mlp", "flow", "mlp", "mlp"),
    (False, "residual", "flow", "residual", "mlp"),
    (False, "flow", None, "mlp", "mlp"),
    (None, "flow", None, "flow", "flow"),
    (None, "residual", None, "residual", "mlp"),
    (None, "flow", "mlp", "flow", "mlp"),  # trained by its end points through the integrator
]
MODELS = {"mlp": MLPWorldModel, "residual": ResidualWorldModel, "flow": FlowWorldModel}
LOSSES = {"mlp": MLPDynamicsLoss, "flow": FlowMatchingDynamicsLoss}


@pytest.mark.parametrize(("switch", "model", "loss", "made_model", "made_loss"), PAIRS)
def test_the_switch_decides_model_and_loss_and_a_missing_loss_is_the_models_own(switch, model, loss, made_model, made_loss):
    config = alg("pwm_cpu")
    config |= {"use_flow_dynamics": switch, "dynamics_loss": loss and {"_target_": f"{LOSSES[loss].__module__}.{LOSSES[loss].__name__}"}}
    config["model"] |= {"_target_": f"{MODELS[model].__module__}.{MODELS[model].__name__}", "dynamics": None}
    if loss is None:
        del config["dynamics_loss"]
    with torch.device("meta"):
        made = PWM.from_config(config, **MT30)
    assert type(made.model) is MODELS[made_model] and type(made.dynamics_loss) is LOSSES[made_loss]
    assert made.use_flow_dynamics == (made_loss == "flow")


def test_the_settings_of_an_agent_on_top_are_left_alone():
    assert agent("pwm_cpu", "+alg.agent.gamma=0.9").use_flow_dynamics is False


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
        ("alg.sanityy is unknown; alg takes use_flow_dynamics, model, dynamics_loss, integrator", ["+alg.sanityy.patience=3"]),
        ("alg.integrator.typo is unknown; alg.integrator takes type, substeps, tau_sampling", ["+alg.integrator.typo=1"]),
        ("alg.parity.tol is unknown; alg.parity takes tolerance, on_violation", ["+alg.parity.tol=1"]),
        ("alg.wm is 3; give a group of keys and values", ["alg.wm=3"]),
        ("alg.dynamics_loss is 'mse'; give a group", ["alg.dynamics_loss=mse"]),
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
