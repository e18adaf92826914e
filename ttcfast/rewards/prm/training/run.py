"""The training run of a reward model: its state, steps, validations and output."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ttcfast.models.checkpoint import load_surrogate, units_of
from ttcfast.rewards.prm.network import PairNetwork
from ttcfast.rewards.prm.sizes import make_prm
from ttcfast.rewards.prm.triplets.batches import Batches, Triplets
from ttcfast.runtime.devices import device_of
from ttcfast.runtime.distributed import gathered, rank, ranks, require_equal
from ttcfast.runtime.errors import ArgumentError, CheckpointError
from ttcfast.runtime.files import output_folder
from ttcfast.runtime.training import Stopwatch, TrainingError, TrainingRun, average_again, require_same_settings
from ttcfast.runtime.units import require_units
from ttcfast.transfer import sent

from .config import OptimOptions, TrainPRMConfig, TrainPRMResult
from .losses import RewardLoss
from .validation import Validation

logger = logging.getLogger(__name__)


class PRMTraining(TrainingRun):
    """One training run of a reward model.

    Args:
        device: Device of this process; None for that of ``config``.
        in_ch: Channels of a pair of states, checked against the triplets; None for no check.
    """

    config: TrainPRMConfig
    options, settings_key = "optim.", "settings"

    def __init__(self, config: TrainPRMConfig, device: torch.device | None, in_ch: int | None) -> None:
        self.config, self.device = config, device_of(config.device) if device is None else device
        self.out = output_folder(config.out)
        require_equal(config.settings())
        if config.optim.batch % ranks():
            raise ArgumentError(f"optim.batch is {config.optim.batch} for {ranks()} processes; give a multiple of them")
        torch.manual_seed(config.seed)
        self.triplets = Triplets(config.data.root)
        pool, held = self.triplets.split(config.data.valid, config.seed)
        self.batches = Batches(self.triplets, pool, config.optim.batch, config.augment, config.seed)
        self.steps = config.optim.steps or config.optim.epochs * -(-len(pool) // config.optim.batch)
        self.max_seconds, self.cosine = config.optim.max_seconds, config.sched.cosine
        self.model = self.network = self._network(in_ch).to(self.device)
        if config.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        spec = self.triplets.spec
        self.loss = RewardLoss(self.network, config.loss, None if spec is None else spec.to(self.device)).to(self.device)
        if self.triplets.frames_each < 6 and self.network.kind == "dense":
            raise ArgumentError("model.kind is 'dense', which learns the way to the truth; .pt files keep none: use ttcfast build_prm_data")
        self.validation = self._validation(held) if len(held) and rank() == 0 else None
        self.valid = len(held) > 0
        self.start_optimizer()
        self.forward: nn.Module = self.loss
        if config.compile:
            self.loss.compile(dynamic=False)
        if ranks() > 1:
            self.forward = DistributedDataParallel(self.loss, device_ids=[self.device] if self.device.type == "cuda" else None)
        self.best: dict[str, Tensor] | None = None
        self.best_loss, self.since_best, self.finished = math.inf, 0, False
        self.metrics: dict[str, float] = {}
        self.watch = Stopwatch()

    @property
    def optim(self) -> OptimOptions:
        return self.config.optim

    def step(self, step: int) -> dict[str, float]:
        """Make one update and return the losses of the whole batch."""
        share = self.optim.batch // ranks()
        frames = self.batches.of_step(step, range(rank() * share, (rank() + 1) * share))
        frames = sent(frames, self.device)
        self.network.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            terms = self.forward(frames)
        made = self.descend(terms["loss"], step, terms)
        everyone = gathered({name: made[name] for name in terms})
        return {**made, **{n: sum(v[n] for v in everyone) / len(everyone) for n in terms}}

    def validate(self, step: int) -> dict[str, float]:
        """Measure the averaged weights, keep the best, and decide whether to stop."""
        if not self.valid:
            return {}
        found: dict[str, float] = {}
        if self.validation is not None:
            with self.averaged():
                found = self.validation.metrics(self.loss, self.device)
            self._tell_collapse(found, step)
        found = gathered(found)[0]
        if not math.isfinite(found["loss"]):
            raise TrainingError(f"the validation loss is {found['loss']} at step {step}; lower optim.lr (now {self.config.optim.lr})")
        self.since_best += 1
        if found["loss"] < self.best_loss:
            self.best_loss, self.since_best, self.metrics = found["loss"], 0, {**found, "step": float(step)}
            self.best = {name: tensor.clone() for name, tensor in self.average.items()}
        self.finished = self.config.patience is not None and self.since_best >= self.config.patience
        return found

    def settings(self) -> dict[str, Any]:
        return self.config.settings()

    def state(self) -> dict[str, Any]:
        return {
            **super().state(),
            "best": {} if self.best is None else dict(self.best),
            "best_loss": self.best_loss,
            "since_best": self.since_best,
            "finished": self.finished,
            "metrics": self.metrics,
            **self._sources(),
        }

    def _sources(self) -> dict[str, Any]:
        """Return the fingerprints of triplets and surrogate, which a resume must not change either."""
        return {"surrogate": self.triplets.surrogate, "triplets": self.triplets.fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        require_same_settings(self.training, state, self._sources())
        super().restore(state)
        self.best = average_again(state["best"], self.average) if state["best"] else None
        self.best_loss, self.since_best, self.metrics = float(state["best_loss"]), int(state["since_best"]), dict(state["metrics"])
        self.finished = bool(state["finished"]) and self.config.patience is not None

    def stopped(self) -> bool:
        return self.finished

    def result(self) -> TrainPRMResult:
        """Write the reward model and return it; every process calls this."""
        if rank() == 0:
            self.saved(self.done)
        gathered(None)  # so that no process reads the folder before it is written
        return TrainPRMResult(PairNetwork.from_pretrained(self.out), self.out, self.done, dict(self.metrics))

    def saved(self, step: int) -> None:
        weights = self.average if self.best is None else self.best
        self.network.info = {
            "surrogate": self.triplets.surrogate,
            "time_step": self.triplets.files[0].config.get("time_step") if self.triplets.files else None,
            "margin": self.config.loss.margin,
            "training": {**asdict(self.config), "steps_done": step, "processes": ranks(), "seconds": round(self.watch.seconds(), 1)},
            "validation": self.metrics,
        }
        with self.averaged(weights):
            self.network.save_pretrained(self.out)

    def _network(self, in_ch: int | None) -> PairNetwork:
        options, triplets = self.config.model, self.triplets
        channels = 2 * int(triplets.frames([0]).shape[2])
        if in_ch is not None and in_ch != channels:
            raise ArgumentError(f"in_ch is {in_ch} and the triplets' states have {channels // 2} channels; give in_ch={channels}")
        if options.init is not None:
            network = PairNetwork.from_pretrained(options.init)
            if network.in_ch != channels:
                raise CheckpointError(f"model.init {options.init} has in_ch {network.in_ch}; the triplets need {channels}")
            if triplets.files:
                remedy = "give another model.init, or triplets of such data"
                require_units(triplets.files[0].units(), network.units(f"model.init {options.init}"), remedy)
            return network
        common = {"normalizer": triplets.normalizer, "spec": triplets.spec, "padding": options.padding}
        return make_prm(options.kind, channels, options.size, options.sizes(), **common)

    def _validation(self, held: Any) -> Validation:
        checkpoint, data = self.config.fm.ckpt, self.config.data
        surrogate = None if checkpoint is None else load_surrogate(checkpoint, device=self.device)
        if surrogate is not None and self.triplets.files:
            remedy = "give the surrogate of the triplets, or fm.ckpt=null"
            require_units(self.triplets.files[0].units(), units_of(surrogate, str(checkpoint)), remedy)
        return Validation(self.triplets, held, surrogate=surrogate, most=data.valid_samples, groups=data.valid_groups)

    def meta(self) -> dict[str, Any]:
        return {"architecture": "prm training", "kind": self.network.kind, **self.network.config()}

    @staticmethod
    def _tell_collapse(found: dict[str, float], step: int) -> None:
        share = max(found.get("triplet/collapsed", 0.0), found.get("all/collapsed", 0.0))
        if share > 0.5:
            warnings.warn(
                f"step {step}: the scores of {share:.0%} of the validation groups are all the same, so a controller would fall back to the "
                "deterministic step; train longer, lower the weight of the penalties, or use model.kind=dense",
                RuntimeWarning,
                stacklevel=2,
            )
