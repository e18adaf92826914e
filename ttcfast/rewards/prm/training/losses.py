"""Losses of reward models: margins between the candidates of a triplet, the error field, and physical penalties."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttcfast.checks import at_least, one_of
from ttcfast.rewards.prm.dense import DensePRM
from ttcfast.rewards.prm.network import PairNetwork
from ttcfast.runtime.training import LOSSES
from ttcfast.spec import StateSpec
from ttcfast.transfer import indices, on_device, sent

STATE, BEST, MEDIAN, WORST, DETERMINISTIC, TRUTH = range(6)  # frames of a sample, as triplet files have them
CANDIDATES = {"best": BEST, "median": MEDIAN, "worst": WORST, "deterministic": DETERMINISTIC}
VIOLATION = 0.5  # size of a violation, in standard deviations of a step's change (conservation) or of the state (boundary)


def triplet_margin_loss(s_best: Tensor, s_med: Tensor, s_worst: Tensor, margin: float = 0.2) -> Tensor:
    """Return the triplet margin loss of scores ``[M]`` as a scalar: zero if best beats median and median beats worst by ``margin``.

    Raises:
        ValueError: The margin is no finite number above 0; with none, a constant score would be perfect.

    Source: TTC plan, "Training the PRM".
    """
    _check_margin(margin)
    return F.relu(margin - (s_best - s_med)).mean() + F.relu(margin - (s_med - s_worst)).mean()


@dataclass(frozen=True)
class LossOptions:
    """Terms of the loss and their weights.

    Args:
        margin: Margin of the triplet loss. A scalar model's scores are in units of their own; a dense model's are divided by half the
            true distance from best to worst, so that exact scores are about 1 apart.
        margin_weight: Weight of the triplet loss; None means 1 for a scalar model and 0.05 for a dense one.
        field: ``"l1"``, ``"mse"`` or ``"huber"`` loss of a dense model's field, in units of ``delta_std``.
        field_weight: Weight of the field loss.
        frames: Candidates on which the field is learned, among best, median, worst and deterministic.
        conservation, boundary: Weights of the penalties; 0 for none. For a dense model they penalise the residual of each conserved total
            and of the prescribed values after its field is added to the candidate; for a scalar one, copies of the best candidate that
            violate them and do not score lower by the margin.

    Source: TTC plan, "Training the PRM", "Pitfalls & Gotchas".
    """

    margin: float = 0.2
    margin_weight: float | None = None
    field: str = "l1"
    field_weight: float = 1.0
    frames: tuple[str, ...] = ("deterministic", "best", "median", "worst")
    conservation: float = 0.0
    boundary: float = 0.0

    def __post_init__(self) -> None:
        _check_margin(self.margin)
        one_of("field", self.field, tuple(LOSSES))
        for name in self.frames:
            one_of("frames", name, tuple(CANDIDATES))
        if not self.frames or len(set(self.frames)) != len(self.frames):
            raise ValueError(f"frames is {self.frames}; name some of {', '.join(CANDIDATES)}, each once")
        for name in ("field_weight", "conservation", "boundary", *(["margin_weight"] if self.margin_weight is not None else [])):
            at_least(name, getattr(self, name), 0)


class RewardLoss(nn.Module):
    """``forward(frames [M, F, C, X, Y]) -> {"loss", "margin", "field", ...}``, means over the M samples; F = 4 suffices for a scalar model.

    Raises:
        ValueError: A penalty does not apply to the layout, or a field is to be learned without frames of the truth.
    """

    def __init__(self, network: PairNetwork, options: LossOptions, spec: StateSpec | None) -> None:
        super().__init__()
        self.network, self.options = network, options
        if options.conservation and (spec is None or not spec.conserved_channels):
            raise ValueError(
                f"loss.conservation is {options.conservation} but nothing is conserved in states of {spec}; use loss.conservation=0"
            )
        if options.boundary and (spec is None or spec.boundary_mask is None):
            raise ValueError(f"loss.boundary is {options.boundary} but the triplets' layout has no boundary_mask; use loss.boundary=0")
        self.spec = spec
        self.boundary_share = 1.0 if spec is None or spec.boundary_mask is None else float(spec.boundary_mask.double().mean())
        dense = isinstance(network, DensePRM)
        weight = options.margin_weight
        self.margin_weight = (0.05 if dense else 1.0) if weight is None else weight
        norm = network.normalizer
        ones = torch.ones(network.channels, 1, 1)
        self.register_buffer("step_scale", ones if norm is None else norm.delta_std.detach().clone().reshape(-1, 1, 1), persistent=False)
        self.register_buffer("state_scale", ones if norm is None else norm.std.detach().clone().reshape(-1, 1, 1), persistent=False)

    step_scale: Tensor
    state_scale: Tensor

    def forward(self, frames: Tensor) -> Mapping[str, Tensor]:
        terms = self._dense(frames) if isinstance(self.network, DensePRM) else self._scalar(frames)
        weights = {
            "margin": self.margin_weight,
            "field": self.options.field_weight,
            "conservation": self.options.conservation,
            "boundary": self.options.boundary,
        }
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return {"loss": total, **{name: value.detach() for name, value in terms.items()}}

    def _scalar(self, frames: Tensor) -> dict[str, Tensor]:
        state, triplet = frames[:, STATE], frames[:, BEST : WORST + 1]
        copies = [self._violated(state, frames[:, BEST], name) for name in ("conservation", "boundary") if getattr(self.options, name)]
        group = torch.cat([triplet, *(copy.unsqueeze(1) for copy in copies)], 1)
        scores = self.network.score_group(state, group)
        margin = self.options.margin
        terms = {"margin": triplet_margin_loss(scores[:, 0], scores[:, 1], scores[:, 2], margin)}
        at = 3
        for name in ("conservation", "boundary"):
            if getattr(self.options, name):
                terms[name] = F.relu(margin - (scores[:, 0] - scores[:, at])).mean()
                at += 1
        return terms

    def _dense(self, frames: Tensor) -> dict[str, Tensor]:
        network, options = self.network, self.options
        assert isinstance(network, DensePRM)
        triplet = ["best", "median", "worst"] if self.margin_weight else []
        names = list(dict.fromkeys([*triplet, *options.frames]))
        state, cands = frames[:, STATE], frames.index_select(1, indices([CANDIDATES[n] for n in names], frames.device))
        fields = network.error_group(state, cands)
        wanted = (frames[:, TRUTH].unsqueeze(1) - cands) / self.step_scale
        learned = indices([names.index(n) for n in options.frames], frames.device)
        terms = {"field": LOSSES[options.field](fields.index_select(1, learned), wanted.index_select(1, learned))}
        if self.margin_weight:
            scores, exact = (-x[:, :3].square().mean((2, 3, 4)) for x in (fields, wanted))
            half = ((exact[:, 0] - exact[:, 2]) / 2).clamp_min(torch.finfo(exact.dtype).tiny)
            scores = scores / torch.where(half > 1e-6 * exact[:, 0].abs(), half, torch.inf).unsqueeze(1)  # no lesson where all are alike
            terms["margin"] = triplet_margin_loss(scores[:, 0], scores[:, 1], scores[:, 2], options.margin)
        if options.conservation:
            assert self.spec is not None
            excess = fields + (cands - state.unsqueeze(1)) / self.step_scale
            volume = on_device(self.spec.cell_volume, excess.device, excess.dtype).expand(excess.shape[-2:])
            means = (excess * volume).sum((-2, -1)) / volume.sum()
            terms["conservation"] = means.index_select(-1, indices(self.spec.conserved_channels, means.device)).square().mean()
        if options.boundary:
            assert self.spec is not None and self.spec.boundary_mask is not None
            corrected = cands + fields * self.step_scale
            value = 0.0 if self.spec.boundary_value is None else self.spec.boundary_value
            violation = (corrected - on_device(value, corrected.device, corrected.dtype)) / self.state_scale
            terms["boundary"] = (
                torch.where(sent(self.spec.boundary_mask, violation.device), violation, 0).square().mean() / self.boundary_share
            )
        return terms

    def _violated(self, state: Tensor, best: Tensor, what: str) -> Tensor:
        """Return copies of the best candidates that violate a conserved total or prescribed values, up in even samples, else down."""
        assert self.spec is not None
        sign = (1 - 2 * (torch.arange(len(best), device=best.device) % 2)).to(best.dtype).reshape(-1, 1, 1, 1)
        if what == "conservation":
            at = indices(self.spec.conserved_channels, best.device)
            broken = torch.zeros_like(self.step_scale).index_copy(0, at, self.step_scale.index_select(0, at))
            return best + sign * VIOLATION * broken
        assert self.spec.boundary_mask is not None
        return torch.where(sent(self.spec.boundary_mask, best.device), best + sign * VIOLATION * self.state_scale, best)


def _check_margin(margin: float) -> None:
    if not (isinstance(margin, numbers.Real) and 0 < margin < math.inf):
        raise ValueError(
            f"margin is {margin!r}; give a finite number above 0 (the plan has 0.2, the paper 0.1); with none, a constant score is best"
        )
