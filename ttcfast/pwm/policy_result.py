"""What a run of ``ttcfast train_policy`` measured, and its file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttcfast.runtime.errors import CheckpointError
from ttcfast.runtime.files import parse_json, require_regular
from ttcfast.runtime.training import require_same_settings

from .evaluation.imagination import ImaginationErrors


@dataclass(frozen=True)
class Evaluation:
    """What was measured after ``step`` updates of the policy.

    Attributes:
        returns: Return of every episode of the mean policy.
        predicted, realised: Mean discounted value of the episodes' first states, by the critic and as earned within the episode.
        esnr_db, esnr_unbiased_db: ESNR of the actor's gradient, NaN where it is not above 0. In dmo that of the update before, so NaN for
            the initial policy.
        gradient_cosine: Cosine of the actor's gradient with finite differences of the imagined return.
        gradient_norm: Median norm of the actor's gradient before clipping over the updates since the last evaluation, in units of the
            rewards. NaN where none was made, as for the initial policy, or it was not kept.
        seconds, cpu_seconds: Wall-clock and processor time of all updates up to here, the world model's included; NaN where not kept.
        simulator_cosine: Cosine of the world model's gradient of the return of H actions with the simulator's, by finite differences along
            the first episode. NaN for a simulator whose state cannot be set.
        dynamics_lipschitz, reward_lipschitz: Largest local Lipschitz constants of the world model's dynamics and reward along it.
        action_sensitivity: Mean norm of the Jacobian of the next latent with respect to the action along it.
        saturation: Share of the episodes' actions beyond 0.98.
    """

    step: int
    returns: tuple[float, ...]
    predicted: float
    realised: float
    esnr_db: float
    esnr_unbiased_db: float
    gradient_cosine: float
    gradient_norm: float = math.nan
    seconds: float = math.nan
    cpu_seconds: float = math.nan
    simulator_cosine: float = math.nan
    dynamics_lipschitz: float = math.nan
    reward_lipschitz: float = math.nan
    action_sensitivity: float = math.nan
    saturation: float = math.nan

    @property
    def mean(self) -> float:
        """Mean return, NaN without an episode that went through."""
        return sum(self.returns) / len(self.returns) if self.returns else math.nan


@dataclass(frozen=True)
class PolicyResult:
    """Outcome of one run.

    Attributes:
        evaluations: In order, the first of the initial policy (step 0); the last is of the final episodes.
        errors, errors_before: Errors of imagination on held-out recorded episodes at the end, and before the policy's first update.
        detach: Whether the policy's gradient left out the part through the latents it sees.
        parameters, dynamics_gap: Parameters of the world model, and those of its dynamics relative to the MLP's.
        dynamics_evaluations: Evaluations of the dynamics network per imagined step.
        field_evaluations: Evaluations of the dynamics network in training, that of a batch counting as one.
        own_episodes, failed: Episodes that the policy added to the data, and those that were dropped because the simulator failed. In dmo
            an episode of the data is a rollout of H steps.
        wm_seconds, policy_seconds, cpu_seconds: Wall-clock of the updates of world model and policy, and processor time of both. In dmo
            these include the simulator, whose workers, if any, count in wall-clock alone.
        skipped, stopped: Skipped updates of both, and whether the sanity checks ended the run.
        device: Kind of device, ``"cpu"`` or ``"cuda"``.
        environment_steps: Agent steps that the policy made in the simulator to learn from, beside recorded data and evaluations. None in
            results of versions that did not count them.
    """

    task: str
    arm: str
    seed: int
    mode: str
    evaluations: tuple[Evaluation, ...]
    errors: ImaginationErrors
    errors_before: ImaginationErrors
    detach: bool
    parameters: int
    dynamics_gap: float
    dynamics_evaluations: int
    field_evaluations: int
    own_episodes: int
    failed: int
    wm_seconds: float
    policy_seconds: float
    cpu_seconds: float
    skipped: int
    stopped: bool
    device: str = "cpu"
    environment_steps: int | None = None


def read_result(path: Path, now: Mapping[str, Any] | None = None) -> PolicyResult | None:
    """Return the result that a run wrote to ``path``, None if there is no such file.

    Args:
        path: A result.json.
        now: Settings that the run must have been made with; None for any.

    Raises:
        CheckpointError: The file is damaged, or of a run with other settings.
    """
    if not path.exists():
        return None
    try:
        held = parse_json(require_regular(path, "result", "", CheckpointError).read_text(encoding="utf-8"))
        values: dict[str, Any] = dict(held["result"])
        values["evaluations"] = tuple(evaluation_of(e) for e in values["evaluations"])
        values |= {name: errors_of(values[name]) for name in ("errors", "errors_before")}
        found, before = PolicyResult(**values), dict(held["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it, or give another out= or resume=false") from error
    if now is not None:
        require_same_settings(path, before, now)
    return found


def _number(value: float | None) -> float:
    """Return ``value``; NaN, for which strict JSON has null, is always one object, so that results with it can be equal."""
    return math.nan if value is None or value != value else value


def evaluation_of(held: Mapping[str, Any]) -> Evaluation:
    return Evaluation(**_values(held))


def errors_of(held: Mapping[str, Any]) -> ImaginationErrors:
    return ImaginationErrors(**_values(held))


def _values(held: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(map(_number, v)) if isinstance(v, (list, tuple)) else _number(v) for k, v in held.items()}
