"""Shards of episodes in the format of TD-MPC2's MT30 and MT80: written whole or not at all, read lazily, and read without running code.

Our own data and the published sets share one format, so that the reader of the published ones is in daily use. A shard is a ``.pt`` file
with the entries ``obs [E, T+1, O]``, ``action [E, T+1, A]``, ``reward [E, T+1]`` and ``task [E, T+1]``; row 0 holds the observation at the
reset beside NaN, row t the action that led to its observation and the reward of that action. Our shards are plain dicts of tensors, with
the settings that made them as JSON in ``meta``. The published ones pickle a ``TensorDict``; reading them needs neither that package nor
trust, since ``weights_only=True`` and stand-in classes extract the tensors. Both are mapped into memory: opening a shard reads its
directory, and a window only its own pages, as in HDF5.

Source: the data sets MT30 and MT80 of TD-MPC2 (Hansen, Su and Wang, 2024).
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttcfast.runtime.errors import DataError
from ttcfast.runtime.files import atomic_write, parse_json, require_regular
from ttcfast.runtime.steady import steady

from .episodes import Episode, Shard, after_reset

_KEYS = ("obs", "action", "reward", "task")
_LISTED = 8
_MISSING = "make some with `ttcfast collect` or give another path"


def write_shard(path: str | os.PathLike[str], episodes: Sequence[Episode], parameters: Mapping[str, Any]) -> None:
    """Write episodes of equal sizes as one shard, atomically.

    Args:
        path: The file to write, ``*.pt``.
        episodes: At least one.
        parameters: How the episodes were made (JSON values), stored in the file and read back as ``ReplayShard.parameters``.

    Raises:
        ValueError: No episode, episodes of different sizes, or values that are not finite.
        OutputError: The file cannot be written or the disk is full.
    """
    if not episodes:
        raise ValueError("episodes is empty; a shard holds at least one")
    for i, episode in enumerate(episodes):
        _check_episode(i, episode, episodes[0])
    obs = torch.stack([e.obs for e in episodes]).float()
    action = torch.stack([after_reset(e.act.float()) for e in episodes])
    reward = torch.stack([after_reset(e.rew.float()) for e in episodes])
    task = torch.tensor([e.task for e in episodes])[:, None].repeat(1, obs.shape[1])
    held = {"obs": obs, "action": action, "reward": reward, "task": task, "meta": json.dumps({"ttcfast": dict(parameters)}, sort_keys=True)}
    with atomic_write(path, "wb") as file, steady(file) as safe:  # torch ends the process if writing fails
        torch.save(held, safe)  # type: ignore[arg-type]  # which asks for write alone


class ReplayShard(Shard):
    """One shard, ours or TD-MPC2's; see the module. Only the header is held, so instances can be pickled for workers.

    Args:
        path: The ``.pt`` file.
        verify: Verify the checksums stored in the file, which reads it once (1 to 2 GB/s).

    Attributes:
        parameters: How ``ttcfast collect`` made the shard; empty for other files.

    Raises:
        DataError: The file is missing, damaged, truncated, of another layout, or holds something other than tensors.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        place = require_regular(path, "replay shard", _MISSING)
        if verify:
            _check_sums(place)
        held, meta = _load(place)
        self.path = place
        self._check(held)
        super().__init__(place, held, meta)

    def _load(self) -> dict[str, Tensor]:
        return _load(self.path)[0]

    def _check(self, held: Mapping[str, Tensor]) -> None:
        shapes = {name: tuple(held[name].shape) for name in _KEYS}
        episodes, rows = shapes["obs"][:2] if len(shapes["obs"]) == 3 else (0, 0)
        expected = {"obs": (episodes, rows, -1), "action": (episodes, rows, -1), "reward": (episodes, rows), "task": (episodes, rows)}
        for name, wanted in expected.items():
            fits = len(shapes[name]) == len(wanted) and all(w in (-1, n) for w, n in zip(wanted, shapes[name]))
            if not fits or episodes < 1 or rows < 2 or 0 in shapes[name]:
                raise self._foreign(f"{name} has shape {list(shapes[name])}, obs {list(shapes['obs'])}")
            if held[name].is_complex() or (name != "task" and not held[name].is_floating_point()):
                raise self._foreign(f"{name} is {held[name].dtype}")
            if held[name].nbytes > (there := held[name].untyped_storage().nbytes()):  # a stride of 0 declares any number of episodes
                raise self._foreign(f"{name} has shape {list(shapes[name])} and {there} bytes of it are there")
        ends = torch.tensor([0, episodes - 1])
        # Under the other convention, an action beside the observation it starts from, a model would be trained to see the future.
        if not (held["action"][ends, 0].isnan().all() and held["reward"][ends, 0].isnan().all()):
            raise self._foreign("row 0 has an action and a reward; there they must be NaN, since a row's action is the one that led to it")

    def _foreign(self, found: str) -> DataError:
        return DataError(
            f"replay shard {self.path} is not in TD-MPC2's layout: {found}; "
            "expected obs [E, T+1, O], action [E, T+1, A], reward [E, T+1], task [E, T+1]"
        )


class _HeldTensorDict:
    """Stands in for ``tensordict.TensorDict`` while one is read; it only keeps the pickled fields."""

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)


def _held_tensor_dict(_: type, fields: dict[str, Any]) -> _HeldTensorDict:
    held = _HeldTensorDict()
    held.__setstate__(fields)
    return held


# Names in pickled TensorDicts: of tensordict 0.2 and older, 0.3 to about 0.8, and later ones.
_STAND_INS: list[Any] = [
    (_HeldTensorDict, "tensordict.tensordict.TensorDict"),
    (_HeldTensorDict, "tensordict._td.TensorDict"),
    (_held_tensor_dict, "tensordict._reductions._make_td"),
    (dict, "tensordict.utils._StringOnlyDict"),
]


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the memory-mapped tensors of a shard, and the parameters that our collector stored."""
    require_regular(path, "replay shard", _MISSING)
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch's reader raises many kinds on foreign files
        said = str(error).strip().splitlines() or [type(error).__name__]
        if "eights" in said[0] or "pickle" in said[0].lower():
            raise DataError(
                f"replay shard {path} holds something other than tensors, which is not opened since that could run code ({_short(error)})"
            ) from error
        raise DataError(f"replay shard {path} is cut off or no .pt file ({said[0]}); make or copy it again") from error
    if isinstance(held, _HeldTensorDict):
        held = held.__dict__.get("_tensordict")
    names = sorted(map(str, held)) if isinstance(held, Mapping) else []
    if not isinstance(held, Mapping) or not all(torch.is_tensor(held.get(name)) for name in _KEYS):
        found = ", ".join(names[:_LISTED]) or type(held).__name__
        raise DataError(f"replay shard {path} is not in TD-MPC2's layout: it holds {found}; expected the tensors {', '.join(_KEYS)}")
    return {name: held[name] for name in _KEYS}, _parameters(held.get("meta"))


def _short(error: Exception) -> str:
    """Return the sentence of torch's long message that says what was found."""
    lines = [line.strip() for line in str(error).splitlines() if "Unsupported" in line or "WeightsUnpickler error" in line]
    return lines[0].partition("WeightsUnpickler error:")[2].strip() or lines[0] if lines else str(error).splitlines()[0]


def _parameters(meta: Any) -> dict[str, Any]:
    try:
        return dict(parse_json(meta)["ttcfast"])
    except (TypeError, ValueError, KeyError):
        return {}


def _check_sums(path: Path) -> None:
    """Verify the checksums of a file, which torch's reader ignores."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, zlib.error, EOFError, RuntimeError, ValueError, struct.error) as error:  # names, flags, sizes
        raise DataError(f"replay shard {path} is cut off or no .pt file ({error}); make or copy it again") from error
    if damaged is not None:
        raise DataError(f"replay shard {path} is damaged (the checksum of {damaged} does not fit); make or copy it again")


def _check_episode(i: int, episode: Episode, first: Episode) -> None:
    steps = len(first.act)
    wanted = {"obs": (steps + 1, first.obs.shape[-1]), "act": (steps, first.act.shape[-1]), "rew": (steps,)}
    for name, shape in wanted.items():
        values = getattr(episode, name)
        if tuple(values.shape) != shape or steps < 1:
            raise ValueError(
                f"{name} of episode {i} has shape {tuple(values.shape)}; expected {shape}, as in episode 0, of at least one step"
            )
        if not values.isfinite().all():
            raise ValueError(f"{name} of episode {i} is not finite; the simulation broke")
