"""The state of a search between two steps, kept in a file, so that a rollout that is killed goes on from its last step."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttcfast.runtime.errors import CheckpointError
from ttcfast.runtime.files import output_folder, strict

from .history import History, Layer
from .paths import BeamRun
from .result import BeamStepOutput

FILE = "rollout.safetensors"
_TENSORS = ("window", "problem", "beam", "path", "rows")
_NUMBERS = ("step", "spent", "copies", "seconds", "coasting")
_NAMED = 4  # settings that an error names


class SavedRollout:
    """The file that a rollout is kept in, written beside its place and renamed after every step.

    Args:
        folder: of the file; made when missing.
        settings: of the rollout, as ``fingerprint`` makes them.
        describe: gives the settings of the objects that take part. One that is another after a step, such as a count of calls, changes by
            use and is not compared.
        writes: whether this process writes; one that does not reads what another has written.

    Raises:
        CheckpointError: the folder holds another rollout, or a damaged file.
        OutputError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        describe: Callable[[], Mapping[str, Any]],
        writes: bool = True,
    ) -> None:
        self.path, self._writes = output_folder(folder) / FILE, writes
        self._describe, self._objects, self._changing = describe, fingerprint(describe()), set[str]()
        self._settings, self._used = {**settings, **self._objects}, False

    def restore(self, run: BeamRun) -> bool:
        """Put ``run`` where the rollout was left; False where there is none yet."""
        if not self.path.exists():
            return False
        from ttcfast.runtime import checkpoints  # only here: the search works without safetensors

        state, meta = checkpoints.load_state(self.path)
        self._changing |= set(meta.get("changing", []))
        self._check(meta.get("rollout", {}))
        with checkpoints.entries_of(self.path, "a rollout to go on from"):
            self._put_back(run, state)
        return True

    def _put_back(self, run: BeamRun, state: Mapping[str, Any]) -> None:
        device = run.window.device
        _require_fitting(run, state)
        for name in _TENSORS:
            setattr(run, name, state[name].to(device))
        for name in _NUMBERS:
            setattr(run, name, state[name])
        layers = [Layer(**{name: _moved(value, device) for name, value in layer.items()}) for layer in state["layers"]]
        run.history = History()
        run.history.layers = layers
        run.outputs = [BeamStepOutput(**_moved(output, device)) for output in state["outputs"]]
        run.ended = _moved(state["ended"], device)

    def keep(self, run: BeamRun) -> None:
        if not self._writes:
            return
        from ttcfast.runtime import checkpoints  # only here: the search works without safetensors

        assert run.history is not None
        if not self._used:  # once: it reads all weights
            now = fingerprint(self._describe())
            self._changing |= {name for name in {**self._objects, **now} if self._objects.get(name) != now.get(name)}
            self._used = True
        state = {name: getattr(run, name) for name in (*_TENSORS, *_NUMBERS)}
        state["layers"] = [vars(layer) for layer in run.history.layers]
        state["outputs"] = [{f.name: getattr(out, f.name) for f in dataclasses.fields(out)} for out in run.outputs]
        state["ended"] = run.ended
        checkpoints.save_state(self.path, state, {"rollout": self._settings, "changing": sorted(self._changing)})

    def _check(self, found: Mapping[str, Any]) -> None:
        odd = [name for name in {**self._settings, **found} if self._settings.get(name) != found.get(name)]
        odd = [name for name in odd if not any(f"{name}.".startswith(f"{other}.") for other in self._changing)]  # and what is in them
        if odd:
            told = "; ".join(f"{name} is {_short(self._settings.get(name))}, there {_short(found.get(name))}" for name in odd[:_NAMED])
            more = f"; and {len(odd) - _NAMED} more" if len(odd) > _NAMED else ""
            raise CheckpointError(
                f"{Path(self.path).parent} holds a rollout of another configuration: {told}{more}; give another folder, or resume=false"
            )


def _require_fitting(run: BeamRun, state: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless ``state`` can be that of ``run`` at a later step: a file may have been made by hand, and
    what does not fit would be noticed steps later, or never."""
    count = len(state["problem"])
    for name in _TENSORS:
        like = getattr(run, name)
        _require_tensor(name, state[name], like.dtype, (count, *like.shape[1:]))
    for name, kind in (("step", int), ("spent", int), ("copies", int), ("seconds", (int, float)), ("coasting", bool)):
        if not isinstance(state[name], kind) or (kind is int and isinstance(state[name], bool)) or state[name] < 0:
            raise TypeError(f"{name} is {state[name]!r}")
    if not len(state["layers"]) <= len(state["outputs"]) == state["step"] <= run.T:
        raise ValueError(f"{len(state['layers'])} layers and {len(state['outputs'])} outputs at step {state['step']} of {run.T}")
    above, states = len(run.problem), run.window.shape[-state["layers"][0]["states"].ndim + 1 :] if state["layers"] else ()
    for layer in state["layers"]:
        rows = len(layer["parent"])
        _require_tensor("states", layer["states"], run.window.dtype, (len(layer["states"]), *states))
        for name, least, end in (("parent", 0, above), ("stored", -1, len(layer["states"]))):
            _require_tensor(name, layer[name], torch.int64, (rows,))
            _require_range(name, layer[name], least, end)
        above = rows
    _require_range("problem", state["problem"], 0, run.n)
    _require_range("beam", state["beam"], 0, run.k)
    _require_range("rows", state["rows"], 0, above if state["layers"] else max(count, 1))


def _require_tensor(name: str, value: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    found = (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
    if found != (dtype, shape):
        raise TypeError(f"{name} is {found}; expected {dtype} {shape}")


def _require_range(name: str, values: Tensor, least: int, end: int) -> None:
    if values.numel() and not least <= int(values.min()) <= int(values.max()) < end:
        raise ValueError(f"{name} goes from {int(values.min())} to {int(values.max())}; it lies from {least} to {end - 1}")


def fingerprint(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them, so that those of a file and of this process can be compared."""
    return json.loads(json.dumps(strict({name: _plain(value) for name, value in settings.items()})))


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return value
