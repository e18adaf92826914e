"""Reads Minari data sets of continuous control in their HDF5 layout, without the package.

``<data set>/data/main_data.hdf5`` holds a group ``episode_<i>`` per episode with ``observations [T+1, ...]`` (a group of arrays where the
space is a ``Dict`` or ``Tuple``), ``actions [T, ...]``, ``rewards [T]`` and ``terminations [T]``; ``metadata.json`` beside it, or the
file's attributes in older releases, holds the spaces. Source: Minari's documentation, "Dataset Standards" (Farama Foundation).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ttcfast.runtime.errors import DataError
from ttcfast.runtime.files import parse_json, require_regular
from ttcfast.runtime.hdf5 import array, open_hdf5

from .episodes import Episode, Shard, after_reset

ABSORBING = 16
"""Steps in the absorbing state behind an episode that terminated."""
_FILE, _METADATA = "main_data.hdf5", "metadata.json"
_WHAT, _MISSING = "Minari data set", "give the folder of a data set, which holds data/main_data.hdf5"
_MALFORMED = (KeyError, ValueError, TypeError, AttributeError, IndexError, OSError, RuntimeError)


@dataclass(frozen=True)
class _Layout:
    """What the metadata say: the space of observations, bounds ``[A]`` of the actions, and the parameters of the shards."""

    space: Mapping[str, Any] | None
    bounds: tuple[np.ndarray, np.ndarray] | None
    parameters: dict[str, Any]


class MinariShard(Shard):
    """The episodes of one length of a Minari data set, held in memory. Made by :func:`open_minari`."""

    def __init__(self, path: Path, names: Sequence[str], episodes: Sequence[Episode], layout: _Layout) -> None:
        self._names, self._layout = list(names), layout
        super().__init__(path, _stacked(episodes), layout.parameters)

    def _load(self) -> dict[str, Tensor]:
        with open_hdf5(self.path, _WHAT, _MISSING) as file:
            return _stacked([_episode(self.path, file, name, self._layout) for name in self._names])


def minari_file(root: str | os.PathLike[str]) -> Path | None:
    """Return the HDF5 file of the Minari data set ``root`` (its folder, its folder ``data``, or the file); None if it is none.

    Raises:
        DataError: It is one in another format.
    """
    place = Path(root)
    if place.suffix.lower() in (".hdf5", ".h5") and not place.is_dir():
        return place
    for folder in (place / "data", place):
        if (folder / _FILE).exists():
            return folder / _FILE
        if (folder / _METADATA).exists() and (kind := _json(folder / _METADATA).get("data_format")) is not None:
            raise DataError(f"{_WHAT} {place} is in the format {kind!r}; only 'hdf5' can be read, so write it with data_format='hdf5'")
    return None


def open_minari(root: str | os.PathLike[str]) -> list[MinariShard]:
    """Read a Minari data set: one shard per length of its episodes, in the order of lengths.

    Observations are flattened and joined as by ``ttcfast.pwm.envs.GymnasiumEnv``, and actions scaled from the bounds of the action space to
    [-1, 1]; those beyond the bounds are clipped, as the simulators do. An episode that terminated goes on for 16 steps in the absorbing
    state of that class (the last observation, reward 0, and the actions of the episode's beginning, which change nothing), so that a world
    model sees the end as dynamics.

    Args:
        root: Folder of the data set, or its HDF5 file.

    Raises:
        DataError: It is missing, damaged or of another layout, spaces are no ``Box``, values are not finite, or something refers to other
            files.
    """
    path = minari_file(root)
    if path is None:
        raise DataError(f"{_WHAT} {root} does not exist; {_MISSING}")
    with open_hdf5(path, _WHAT, _MISSING) as file:
        metadata = _json(path.with_name(_METADATA)) if path.with_name(_METADATA).exists() else dict(file.attrs)
        names = sorted((name for name in file if re.fullmatch(r"episode_\d+", name)), key=lambda name: int(name[len("episode_") :]))
        if not names:
            raise DataError(f"{_WHAT} {path} is of another layout: it holds no group episode_<number>")
        if (total := metadata.get("total_episodes", len(names))) != len(names):
            raise DataError(f"{_WHAT} {path} is damaged: it holds {len(names)} episodes of {total}; make or copy it again")
        layout = _layout(path, metadata)
        episodes = [_episode(path, file, name, layout) for name in names]
    sizes = episodes[0].obs.shape[1], episodes[0].act.shape[1]
    lengths: dict[int, list[int]] = {}
    for i, episode in enumerate(episodes):
        if (found := (episode.obs.shape[1], episode.act.shape[1])) != sizes:
            raise DataError(f"{_WHAT} {path} is of another layout: {names[i]} has observations and actions of sizes {found}, not {sizes}")
        lengths.setdefault(len(episode.act), []).append(i)
    layout.parameters["action_dim"] = sizes[1]
    return [MinariShard(path, [names[i] for i in held], [episodes[i] for i in held], layout) for _, held in sorted(lengths.items())]


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(require_regular(path, "metadata", _MISSING).read_bytes()))
    except (TypeError, ValueError) as error:
        raise DataError(f"metadata {path} is damaged ({error}); make or copy it again") from error


def _layout(path: Path, metadata: Mapping[str, Any]) -> _Layout:
    try:
        spaces = {name: _described(metadata.get(name)) for name in ("observation_space", "action_space", "env_spec")}
        observation, action, spec = spaces.values()
        if observation is not None:
            _require_boxes("observation_space", observation)
        bounds = None if action is None else _bounds(action)
    except _MALFORMED as error:
        raise DataError(f"{_WHAT} {path} cannot be used: {error}") from error
    parameters: dict[str, Any] = {}
    if "dataset_id" in metadata:
        parameters["minari"] = str(metadata["dataset_id"])
    if spec is not None and "id" in spec:
        parameters |= {"task": f"gymnasium:{spec['id']}", "number": 0}
    return _Layout(observation, bounds, parameters)


def _described(value: Any) -> dict[str, Any] | None:
    """Return a space or specification that is stored as JSON text."""
    return None if value is None else dict(parse_json(value) if isinstance(value, (str, bytes)) else value)


def _require_boxes(name: str, space: Mapping[str, Any]) -> None:
    if space["type"] in ("Dict", "Tuple"):
        for key, part in _parts(space):
            _require_boxes(f"{name}[{key!r}]", part)
    elif space["type"] != "Box":
        raise ValueError(f"{name} is {space['type']}; only Box, and for observations Dict and Tuple of it, can be read")


def _parts(space: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the names under which the parts of a ``Dict`` or ``Tuple`` are stored, in order, with their spaces."""
    held = space["subspaces"]
    yield from held.items() if space["type"] == "Dict" else ((f"_index_{i}", part) for i, part in enumerate(held))


def _bounds(space: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    if space["type"] != "Box":
        raise ValueError(f"action_space is {space['type']}; only Box actions can be read")
    low, high = (np.ravel(np.asarray(space[name], dtype=np.float64)) for name in ("low", "high"))
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ValueError("action_space has no finite bounds; actions can only be scaled between bounds")
    return low, high


def _episode(path: Path, file: h5py.File, name: str, layout: _Layout) -> Episode:
    try:
        group = file[name]
        obs = np.concatenate(list(_columns("observations", group["observations"], layout.space)), axis=1)
        act = _numbers("actions", group["actions"])
        rew, ended = (_row(key, group[key]) for key in ("rewards", "terminations"))
        steps = len(rew)
        if steps < 1 or len(obs) != steps + 1 or len(act) != steps or len(ended) != steps:
            found = f"{len(obs)} observations, {len(act)} actions, {steps} rewards and {len(ended)} terminations"
            raise ValueError(f"{found}; expected T+1, T, T and T")
        act = _scaled(act, layout.bounds)
    except _MALFORMED as error:
        raise DataError(f"{_WHAT} {path} is damaged or of another layout in {name}: {error}") from error
    for what, values in (("observations", obs), ("actions", act), ("rewards", rew)):
        if not np.isfinite(values).all():
            raise DataError(f"{_WHAT} {path} is damaged: {what} of {name} are not finite; make or copy it again")
    if ended[-1]:
        obs = np.concatenate([obs, np.repeat(obs[-1:], ABSORBING, axis=0)])
        act = np.concatenate([act, np.resize(act, (ABSORBING, act.shape[1]))])
        rew = np.concatenate([rew, np.zeros(ABSORBING)])
    held = [torch.from_numpy(values.astype(np.float32)) for values in (obs, act, rew)]
    return Episode(held[0], held[1], held[2])


def _columns(name: str, item: h5py.Group | h5py.Dataset, space: Mapping[str, Any] | None) -> Iterator[np.ndarray]:
    """Yield the arrays ``[T+1, n]`` of observations in the order of their space, or of their names without one."""
    if isinstance(item, h5py.Group):
        for key, part in _parts(space) if space is not None else ((key, None) for key in sorted(item)):
            yield from _columns(f"{name}/{key}", item[key], part)
    else:
        yield _numbers(name, item)


def _numbers(name: str, data: h5py.Dataset) -> np.ndarray:
    if not isinstance(data, h5py.Dataset) or data.dtype.kind not in "fiub" or data.ndim < 1:
        raise ValueError(f"{name} hold {getattr(data, 'dtype', 'a group')}; only arrays of numbers can be read")
    values = array(data)
    return values.reshape(len(values), -1)


def _row(name: str, data: h5py.Dataset) -> np.ndarray:
    values = _numbers(name, data)
    if values.shape[1] != 1:
        raise ValueError(f"{name} have shape {list(data.shape)}; expected one number per step")
    return values[:, 0]


def _scaled(act: np.ndarray, bounds: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    if bounds is None:
        if np.abs(act).max() > 1:
            raise ValueError("actions lie outside [-1, 1] and no action_space gives their bounds; add metadata.json")
        return act
    low, high = bounds
    if act.shape[1] != len(low):
        raise ValueError(f"actions have {act.shape[1]} entries, action_space {len(low)}")
    return np.clip(2 * (act - low) / (high - low) - 1, -1.0, 1.0)


def _stacked(episodes: Sequence[Episode]) -> dict[str, Tensor]:
    obs = torch.stack([e.obs for e in episodes])
    action, reward = (torch.stack([after_reset(getattr(e, name)) for e in episodes]) for name in ("act", "rew"))
    return {"obs": obs, "action": action, "reward": reward, "task": torch.zeros(obs.shape[:2], dtype=torch.int64)}
