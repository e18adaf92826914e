"""Measures how well a reward model chooses on unseen trajectories, beside a trivial scorer that prefers the deterministic step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ttcfast.core.base_fm import Surrogate
from ttcfast.models.checkpoint import surrogate_hash
from ttcfast.rewards.prm.dense import DensePRM
from ttcfast.rewards.prm.network import PairNetwork
from ttcfast.rewards.prm.triplets.batches import Triplets
from ttcfast.rewards.prm.triplets.file import TripletFile
from ttcfast.runtime.errors import DataError
from ttcfast.spec import StochasticConfig

from .losses import BEST, DETERMINISTIC, STATE, TRUTH, RewardLoss

CLEAR = 0.02  # pairs whose errors differ by more than this share of the smaller are counted separately
TRIVIAL = (
    "regret",
    "share",
    "kendall_tau",
    "pair_accuracy",
    "clear_pair_accuracy",
)  # the other metrics are not meaningful for the trivial scorer
LEAST_SPREAD = 1e-6  # TTCConfig.min_score_spread: below it a controller would fall back


def ranking(scores: Tensor, errors: Tensor) -> dict[str, float]:
    """Measure the scores ``[M, K]`` of groups, given the candidates' errors ``[M, K]``; candidate 0 is the deterministic step.

    Candidates with a non-finite error are left out.

    Returns:
        ``regret``: mean error of the chosen candidate over that of the best, at least 1; ``share``: share of the best's gain over the
        deterministic step that the choice reaches (1: all, below 0: worse than the deterministic step); ``chose_deterministic``;
        ``kendall_tau`` over all pairs of a group, ties in the scores counting as half; ``pair_accuracy`` and ``clear_pair_accuracy``
        (errors more than 2 % apart); ``spread``: median of (largest - smallest score) / largest size; ``collapsed``: share of groups
        whose spread is at most 1e-6.
    """
    usable = errors.isfinite() & scores.isfinite()
    e, s = torch.where(usable, errors.double(), torch.inf), torch.where(usable, scores.double(), -torch.inf)
    chosen, best = e.gather(1, s.argmax(1, keepdim=True)).mean(), e.amin(1).mean()
    start = errors[:, 0].double().mean()
    better = (e.unsqueeze(2) < e.unsqueeze(1)) & (usable.unsqueeze(2) & usable.unsqueeze(1))  # [M, i, j]: i is better than j
    above = (s.unsqueeze(2) > s.unsqueeze(1)).double() + 0.5 * (s.unsqueeze(2) == s.unsqueeze(1)).double()
    clear = better & (e.unsqueeze(1) > (1 + CLEAR) * e.unsqueeze(2))
    accuracy = (above * better).sum((1, 2)) / better.sum((1, 2)).clamp_min(1)
    highest, lowest = s.amax(1), torch.where(usable, scores.double(), torch.inf).amin(1)
    size = torch.where(usable, scores.double().abs(), 0.0).amax(1)
    spread = torch.where(size > 0, (highest - lowest) / size, 0.0)
    return {
        "regret": float(chosen / best),
        "share": float((start - chosen) / (start - best)) if start > best else float("nan"),
        "chose_deterministic": float((s.argmax(1) == 0).double().mean()),
        "kendall_tau": float((2 * accuracy - 1).mean()),
        "pair_accuracy": float(accuracy.mean()),
        "clear_pair_accuracy": float((above * clear).sum() / clear.sum()) if bool(clear.any()) else float("nan"),
        "spread": float(spread.median()),
        "collapsed": float((spread <= LEAST_SPREAD).double().mean()),
    }


class Validation:
    """Held-out samples, and the metrics of a network on them.

    Args:
        triplets: All samples.
        held: Indices of held-out samples, of which at most ``most`` are used, spread over them.
        surrogate: Surrogate that regenerates all K candidates of ``groups`` samples from their keys; None uses the stored frames alone.

    Raises:
        DataError: The surrogate is not the one of the triplets, or does not reproduce their candidates.
    """

    def __init__(
        self,
        triplets: Triplets,
        held: np.ndarray,
        *,
        surrogate: Surrogate | None = None,
        most: int = 256,
        groups: int = 16,
        batch: int = 16,
    ) -> None:
        self.triplets, self.batch = triplets, batch
        self.samples = _spread(held, most)
        self.surrogate, self.groups = surrogate, _spread(held, groups) if surrogate is not None and triplets.files else held[:0]
        self._made: dict[int, Tensor] = {}
        if surrogate is not None and triplets.surrogate is not None and surrogate_hash(surrogate) != triplets.surrogate:
            raise DataError(
                f"the triplets were made with surrogate {triplets.surrogate[:12]} and fm.ckpt is {surrogate_hash(surrogate)[:12]}: its "
                "candidates would be others; give the surrogate of the triplets, or fm.ckpt=null"
            )

    @torch.no_grad()
    def metrics(self, loss: RewardLoss, device: torch.device) -> dict[str, float]:
        """Return ``loss`` over the held-out samples, ``triplet/...`` of their stored candidates and ``all/...`` of all K.

        Those of the trivial scorer are ``trivial_triplet/...`` and ``trivial/...``.
        """
        found: dict[str, float] = {}
        losses, scores, near, errors, explained = [], [], [], [], []
        for part in np.array_split(self.samples, -(-len(self.samples) // self.batch)):
            frames = self.triplets.frames(part.tolist()).to(device)
            losses.append((float(loss(frames)["loss"]), len(part)))
            if frames.shape[1] <= TRUTH:
                continue
            group = frames[:, [DETERMINISTIC, BEST, BEST + 1, BEST + 2]]
            scores.append(loss.network.score_group(frames[:, STATE], group).cpu())
            near.append(_nearness(group, loss.step_scale).cpu())
            errors.append(self._errors(group, frames[:, TRUTH]).cpu())
            if isinstance(loss.network, DensePRM):
                before = (frames[:, TRUTH] - frames[:, DETERMINISTIC]) / loss.step_scale
                after = before - loss.network.error(frames[:, STATE], frames[:, DETERMINISTIC])
                explained.append((float(after.square().sum()), float(before.square().sum())))
        found["loss"] = sum(value * n for value, n in losses) / sum(n for _, n in losses)
        if scores:
            found |= _named("triplet", ranking(torch.cat(scores), torch.cat(errors)))
            found |= _named("trivial_triplet", ranking(torch.cat(near), torch.cat(errors)), TRIVIAL)
        if explained:
            left, total = (sum(values) for values in zip(*explained, strict=True))
            found["error_left"] = left / total
        if len(self.groups):
            group_scores, group_near, group_errors = self.scored(loss.network, device)
            found |= _named("all", ranking(group_scores, group_errors)) | _named("trivial", ranking(group_near, group_errors), TRIVIAL)
        return found

    @torch.no_grad()
    def scored(self, network: PairNetwork, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, nearness to the deterministic step and stored errors of all K candidates of the groups, ``[G, K]`` each."""
        scores, near, errors = [], [], []
        for i in self.groups.tolist():
            candidates = self.candidates(i).to(device)
            state = self.triplets.frames([i])[:, STATE].to(device)
            scores.append(torch.cat([network.score_group(state, part.unsqueeze(0))[0] for part in candidates.split(self.batch)]).cpu())
            scale = torch.ones(()) if network.normalizer is None else network.normalizer.delta_std.reshape(-1, 1, 1)
            near.append(_nearness(candidates.unsqueeze(0), scale.to(device))[0].cpu())
            errors.append(self.triplets.set.errors(i))
        return torch.stack(scores), torch.stack(near), torch.stack(errors)

    def candidates(self, i: int) -> Tensor:
        """Return all K candidates ``[K, C, X, Y]`` of a sample, regenerated from their keys."""
        if i not in self._made:
            assert self.surrogate is not None
            file, inner = self.triplets.set.find(i)
            assert isinstance(file, TripletFile)  # .pt files store no errors, and give no groups
            frames = file.frames([inner])[0]
            seed, step = int(file.config["seed"]), int(file.step[inner])
            rows = torch.tensor([int(file.trajectory[inner])])
            noise = StochasticConfig.of(file.config.get("stochastic"))
            device = next(self.surrogate.parameters()).device
            state = frames[STATE][None].to(device)
            parts = [
                self.surrogate.candidates(state, ids, problem_ids=rows, seed=seed, step=step, stochastic=noise)[0]
                for ids in torch.arange(1, file.K).split(self.batch)
            ]
            made = torch.cat([self.surrogate.deterministic(state, step=step, problem_ids=rows), *parts]).cpu()
            stored, again = frames[BEST : BEST + 3], made[torch.from_numpy(file.picked[inner])]
            if not torch.allclose(again, stored, rtol=1e-3, atol=1e-3 * float((stored - frames[STATE]).std())):
                raise DataError(
                    f"sample {inner} of {file.path}: the candidates made from its keys are not those that are stored "
                    f"(largest difference {float((again - stored).abs().max()):.3g}); use fm.ckpt=null, or make the triplets again"
                )
            self._made[i] = made
        return self._made[i]

    def _errors(self, group: Tensor, truth: Tensor) -> Tensor:
        """Return mean squared errors ``[M, B]`` in the units by which the triplets were ranked."""
        difference = group - truth.unsqueeze(1)
        file = self.triplets.files[0]
        if file.config.get("units", "normalized") == "normalized":
            difference = difference / file.normalizer.std.to(difference).reshape(-1, 1, 1)
        return difference.square().mean((2, 3, 4))


def _nearness(group: Tensor, scale: Tensor) -> Tensor:
    """Return the trivial scores ``-||c - c_0||``, ``[M, B]``; candidate 0 comes first in a group."""
    distance: Tensor = ((group - group[:, :1]) / scale).flatten(2).norm(dim=2)
    return -distance


def _named(prefix: str, values: dict[str, float], keep: Sequence[str] | None = None) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items() if keep is None or name in keep}


def _spread(indices: np.ndarray, most: int) -> np.ndarray:
    """Return at most ``most`` entries, evenly spaced."""
    return indices if len(indices) <= most else indices[np.linspace(0, len(indices) - 1, most).astype(int)]
