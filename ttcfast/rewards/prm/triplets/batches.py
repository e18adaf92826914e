"""Draws training batches of triplets, each a function of the seed, the step and the place in the batch only."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ttcfast.checks import at_least
from ttcfast.core.normalizer import Normalizer
from ttcfast.data.symmetry import random_symmetry
from ttcfast.rewards.prm.dataset import PRMTripletSet
from ttcfast.rewards.prm.training.losses import BEST, STATE, TRUTH
from ttcfast.runtime.errors import DataError
from ttcfast.spec import EulerSpec, StateSpec

from .file import FRAMES, Place, TripletFile


@dataclass(frozen=True)
class AugmentOptions:
    """Augmentation of triplets.

    Args:
        symmetry: Whether to apply random shifts, mirrors and transposes (``ttcfast.data.symmetry``), for triplet files in two dimensions.
        input_noise: Standard deviation of Gaussian noise on the state, relative to that of the state; candidates and truth are unchanged.
        blend: Each candidate moves towards the truth by a random fraction up to this one, so that a dense model also sees what its own
            corrections leave; 0 for none.

    Raises:
        ValueError: ``input_noise`` is negative, or ``blend`` is outside [0, 1).
    """

    symmetry: bool = True
    input_noise: float = 0.0
    blend: float = 0.0

    def __post_init__(self) -> None:
        at_least("input_noise", self.input_noise, 0)
        if not 0 <= self.blend < 1:
            raise ValueError(f"blend is {self.blend}; give a fraction in [0, 1)")


class Triplets:
    """All samples of one or several files as one sequence.

    Args:
        paths: As in ``PRMTripletSet``.

    Attributes:
        trajectory: Trajectory of each sample, int64 ``[M]``, by which validation is split; each ``.pt`` file counts as one.
        frames_each: Frames per sample: 6, or 4 for the plan's files, which store no truth.
        spec: Layout of the states; None for the plan's files.
        normalizer: Normalizer of the surrogate; None for the plan's files.
        surrogate: Hash of the surrogate; None for the plan's files.

    Raises:
        DataError: The paths mix triplet files and ``.pt`` files, or cannot be read.
    """

    def __init__(self, paths: Place | Iterable[Place]) -> None:
        self.set = PRMTripletSet(paths)
        self.files = [part for part in self.set.parts if isinstance(part, TripletFile)]
        whole = len(self.files) == len(self.set.parts)
        if self.files and not whole:
            raise DataError("manifest_paths mix triplet files and .pt files, which have no normaliser; train on one kind")
        first = self.files[0] if self.files else None
        self.spec: StateSpec | None = first.spec if first else None
        self.normalizer: Normalizer | None = first.normalizer if first else None
        self.surrogate = first.surrogate if first else None
        self.frames_each = len(FRAMES) if whole else 4
        self.trajectory = np.concatenate([f.trajectory for f in self.files]) if whole else np.arange(len(self.set))

    def __len__(self) -> int:
        return len(self.set)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the samples and their order, independent of the files' names and places."""
        digest = hashlib.sha256("".join(part.fingerprint() for part in self.set.parts).encode())
        return f"{len(self)} samples, {digest.hexdigest()[:16]}"

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Reads samples ``[m, frames_each, C, X, Y]`` in physical units into new memory."""
        return self.set.frames(indices, first=self.frames_each)

    def split(self, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Splits sample indices into training and validation by trajectory.

        Raises:
            DataError: There are too few trajectories for both.
        """
        numbers = np.unique(self.trajectory)
        count = max(1, round(share * len(numbers))) if share else 0
        if len(numbers) - count < 1:
            raise DataError(f"there are triplets of {len(numbers)} trajectories and {count} would be held out; give more, or data.valid=0")
        held = np.random.default_rng([seed, 0]).permutation(numbers)[:count]
        apart = np.isin(self.trajectory, held)
        return np.flatnonzero(~apart), np.flatnonzero(apart)


class Batches:
    """Batches of an endless series of shuffled, augmented epochs.

    Args:
        triplets: Samples.
        pool: Indices of the samples to train on.
        batch: Batch size over all processes.
        options: Augmentation.
        seed: Seed of the run.

    Raises:
        DataError: ``options.blend`` is set and the files store no truth.
    """

    def __init__(self, triplets: Triplets, pool: np.ndarray, batch: int, options: AugmentOptions, seed: int) -> None:
        self.triplets, self.pool, self.batch, self.options, self.seed = triplets, pool, batch, options, seed
        spec = triplets.spec
        self._symmetric = options.symmetry and isinstance(spec, EulerSpec) and spec.ndim == 2 and len(spec.momentum) == 2
        if options.blend and triplets.frames_each != len(FRAMES):
            raise DataError("augment.blend needs the truth, which the plan's .pt files do not store; use augment.blend=0")

    def of_step(self, step: int, slots: range) -> Tensor:
        """Returns the samples at ``slots`` of batch number ``step``, ``[len(slots), F, C, X, Y]``."""
        places = step * self.batch + np.arange(slots.start, slots.stop)
        epochs = {int(e): np.random.default_rng([self.seed, 2, int(e)]).permutation(self.pool) for e in np.unique(places // len(self.pool))}
        frames = self.triplets.frames([int(epochs[int(p // len(self.pool))][p % len(self.pool)]) for p in places])
        return torch.stack([self._augmented(one, step, slot) for one, slot in zip(frames, slots, strict=True)])

    def _augmented(self, frames: Tensor, step: int, slot: int) -> Tensor:
        rng = np.random.default_rng([self.seed, 1, step, slot])
        if self._symmetric:
            assert self.triplets.spec is not None
            frames = random_symmetry(frames[None], self.triplets.spec, rng)[0]
        if self.options.input_noise:
            noise = torch.from_numpy(rng.standard_normal(frames.shape[1:], dtype=np.float32))
            scale = 1.0 if self.triplets.normalizer is None else self.triplets.normalizer.std.reshape(-1, 1, 1)
            frames[STATE] += self.options.input_noise * scale * noise
        if self.options.blend:
            share = torch.from_numpy(rng.uniform(0, self.options.blend, TRUTH - BEST).astype(np.float32)).reshape(-1, 1, 1, 1)
            frames[BEST:TRUTH] += share * (frames[TRUTH] - frames[BEST:TRUTH])
        return frames
