"""Saves the state of a search after every step, so that a killed rollout resumes from its last step."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import json
import math
import os
import re
import sys
import types
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.runtime import distributed
from ttcfast.runtime.errors import CheckpointError
from ttcfast.runtime.files import output_folder, strict
from ttcfast.spec import StochasticConfig, TTCConfig

from .budget import Budget
from .history import History, Layer
from .paths import Rollout
from .result import BeamStepOutput, RolloutResult, StepOutput

FILE = "rollout.safetensors"
_TENSORS = ("window", "problem", "beam", "path", "rows")
_NUMBERS = ("step", "spent", "copies", "seconds", "coasting")
_NAMED = 4  # settings named in an error message
_LONG = 32  # length from which a sequence is compared by its checksum
_OPAQUE = {*sys.stdlib_module_names, "torch", "numpy"} - {"__main__"}  # packages whose objects are compared only by their class


class SavedRollout:
    """Manages the file that holds a rollout, which is replaced as a whole after every step.

    Args:
        folder: Folder of the file; made when missing.
        run: The rollout at its start. Of processes that all have the same state, one writes and the others read.
        x0: States that it starts from.
        describe: Returns the settings of the objects that take part. A setting that changes with use, such as a count of calls, is not
            compared.

    Raises:
        CheckpointError: The folder holds another rollout, or a damaged file.
        OutputError: The folder cannot be written.

    Attributes:
        chunk_size: Most candidates made at once: the run's own, or that of the rollout it goes on from.
    """

    def __init__(self, folder: str | os.PathLike[str], run: Rollout, x0: Tensor, *, describe: Callable[[], Mapping[str, Any]]) -> None:
        self.path, self._writes = output_folder(folder) / FILE, run.cfg.shard != "candidates" or distributed.rank() == 0
        self.chunk_size = run.sizes[1].limit
        self._describe, self._objects, self._changing, self._used = describe, describe(), set[str](), False
        given = settings_of_rollout(run.cfg, x0, run.T, run.problem_ids, run.budget)
        kept = {name: value for name, value in given.items() if name not in ("use_prm", "shard")}
        plain = {name: dataclasses.asdict(v) if isinstance(v, StochasticConfig | Budget) else v for name, v in kept.items()}
        self._settings = {**json.loads(json.dumps(strict(plain))), **self._objects}

    def restore(self, run: Rollout) -> None:
        """Continues ``run`` from the saved step, if there is one."""
        if not self.path.exists():
            return
        from ttcfast.runtime import checkpoints  # imported lazily: the search works without safetensors

        state, meta = checkpoints.load_state(self.path)
        self._changing |= set(meta.get("changing", []))
        self._check(meta.get("rollout", {}))
        with checkpoints.entries_of(self.path, "a rollout to go on from"):
            device, kind = run.window.device, BeamStepOutput if run.reports_beams else StepOutput
            for name in (*_TENSORS, *_NUMBERS):
                setattr(run, name, moved(state[name], device))
            run.history = History()
            run.history.layers = [Layer(**moved(layer, device)) for layer in state["layers"]]
            run.outputs = [kind(**moved(output, device)) for output in state["outputs"]]
            run.ended = moved(state["ended"], device)
            if run.cfg.chunk_size is None and run.cfg.memory_budget is None:  # measured
                self.chunk_size = state.get("chunk_size", self.chunk_size)
            run.look()

    def keep(self, run: Rollout) -> None:
        """Write the state after a step."""
        if not self._writes:
            return
        from ttcfast.runtime import checkpoints  # imported lazily: the search works without safetensors

        assert run.history is not None
        if not self._used:  # computed once, since it reads all weights
            now = self._describe()
            self._changing |= {name for name in {**self._objects, **now} if self._objects.get(name) != now.get(name)}
            self._used = True
        state = {name: getattr(run, name) for name in (*_TENSORS, *_NUMBERS)}
        state["layers"] = [vars(layer) for layer in run.history.layers]
        state["outputs"] = [vars(out) for out in run.outputs]
        state["ended"], state["chunk_size"] = run.ended, self.chunk_size
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


def settings_of_rollout(cfg: TTCConfig, x0: Tensor, T: int, problem_ids: Tensor, budget: Budget | None) -> dict[str, Any]:
    """Returns the settings of a rollout by name, apart from those of its objects."""
    given = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    return {**given, "T": T, "x0": checksum_of(x0), "problem_ids": problem_ids.tolist(), "budget": budget}


def settings_of(name: str, value: Any, within: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Fingerprint a model or scorer so that a resume, or a search in several processes, detects a mismatch.

    A module counts by its class, a checksum of its weights and its printed layers, a function by its name, code and what it closes over,
    any other object by its class. Attributes are followed, private ones only where they are numbers, strings, functions or objects:
    containers and tensors there are taken for caches.

    Args:
        name: Name under which the settings are reported.
        value: The object.
        within: The objects that ``value`` is an attribute of.

    Returns:
        JSON values by path, such as ``"scorer.weights.w_mass"``.
    """
    plain = _plain(value)
    if plain is not NotImplemented:
        return {name: plain}
    if any(value is outer for outer in within):
        return {name: f"the same as {type(value).__name__}"}
    own, parts = _described(value, any(value is m for outer in within if isinstance(outer, nn.Module) for m in outer.modules()))
    items = {path: v for key, part in parts.items() for path, v in settings_of(f"{name}.{key}", part, (*within, value)).items()}
    if len(parts) > _LONG:
        return {name: f"{own} {_crc(sorted(items.items()))}"}
    return {name: own, **items}


def _described(value: Any, inner: bool) -> tuple[str, dict[str, Any]]:
    """Describe an object by its class and parts. Modules that are parts of another (``inner``) omit their weights and layers."""
    kind = type(value)
    if isinstance(value, Mapping):
        return f"{kind.__name__} of {len(value)}", {str(_plain(key)): item for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return f"{kind.__name__} of {len(value)}", {str(i): item for i, item in enumerate(items)}
    if isinstance(value, types.FunctionType):
        if _opaque(str(value.__globals__.get("__name__"))):  # such as the result of torch.compile
            return f"{value.__module__}.{value.__qualname__}", {}
        closed = inspect.getclosurevars(value).nonlocals
        defaults = {f"default{number}": item for number, item in enumerate(value.__defaults__ or ())}
        own = f"{value.__module__}.{value.__qualname__} {_crc(_code(value.__code__))}"
        return own, {**closed, **(value.__kwdefaults__ or {}), **defaults}
    if isinstance(value, types.MethodType):
        return value.__func__.__qualname__, {"__self__": value.__self__}
    if isinstance(value, functools.partial):
        return "partial", {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, nn.Module):
        parts: dict[str, Any] = {} if inner else {"weights": _weights(value), "layers": _crc(re.sub(" at 0x[0-9a-f]+", "", repr(value)))}
        held = value._modules | ({} if _opaque(kind.__module__) else _attributes(value))
        own_names = {name: f"{name} in it" for name in parts if name in held}  # a list of scorers has weights of its own
        return kind.__name__, {own_names.get(name, name): part for name, part in parts.items()} | held
    return kind.__name__, {} if _opaque(kind.__module__) else _attributes(value)


def _weights(module: nn.Module) -> str:
    """Return a checksum of all parameters and buffers."""
    return _crc(sorted((name, checksum_of(t)) for name, t in (*module.named_parameters(), *module.named_buffers())))


def _attributes(value: Any) -> dict[str, Any]:
    held = dict(getattr(value, "__dict__", {}))
    if dataclasses.is_dataclass(value):
        held |= {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    caches = (Tensor, Mapping, list, tuple, set, frozenset, types.NoneType)
    return {
        n: v
        for n, v in sorted(held.items(), key=lambda item: (item[0].startswith("_"), item[0]))
        if n != "training" and not (n.startswith("_") and isinstance(v, caches))
    }


def _plain(value: Any) -> Any:
    """Return a JSON value for an object that has an obvious one, NotImplemented for others."""
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, (bool, int, str, types.NoneType)) and not isinstance(value, enum.Enum):
        return value
    if isinstance(value, Tensor):
        return checksum_of(value)
    if isinstance(value, (bytes, complex, range, slice, torch.dtype, torch.device, os.PathLike, enum.Enum)):
        return str(value)
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        return f"{value.dtype} {value.shape} {zlib.crc32(value.tobytes()):08x}"
    return NotImplemented


def checksum_of(tensor: Tensor) -> str:
    """Dtype, shape and a checksum of the bytes."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{tensor.dtype} {tuple(tensor.shape)} {zlib.crc32(flat.numpy()):08x}"  # type: ignore[arg-type]


def _crc(value: Any) -> str:
    return f"{zlib.crc32(repr(value).encode()):08x}"


def _code(code: types.CodeType) -> list[Any]:
    """Describe a function's instructions, names and constants, identically in every process."""
    constants = [sorted(c, key=repr) if isinstance(c, frozenset) else c for c in code.co_consts]
    return [code.co_code, code.co_names, [_code(c) if isinstance(c, types.CodeType) else c for c in constants]]


def _opaque(module: str) -> bool:
    return module.partition(".")[0] in _OPAQUE


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def moved(value: Any, device: torch.device) -> Any:
    """``value`` with all tensors in it on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    if isinstance(value, StepOutput | RolloutResult):
        return type(value)(**moved(vars(value), device))
    return value
