"""Reads and writes checkpoints: one safetensors file of tensors with JSON in its header, without pickle, so that loading runs no code."""

from __future__ import annotations

import contextlib
import json
import os
import random
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from .errors import CheckpointError
from .files import atomic_write, parse_json, require_regular

_KEY = "ttcfast"  # the one entry of the header's metadata: a single key keeps the bytes the same from run to run


def save(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write ``tensors`` and ``meta`` into one safetensors file, atomically.

    Args:
        path: File to write, usually ``*.safetensors``.
        tensors: Tensors by name, of any shape, dtype and device. Tied tensors are stored twice.
        meta: JSON values that describe the tensors (``architecture``, sizes, normalisation, ...); NaN and infinities are allowed.

    Raises:
        OutputError: The file cannot be written.
    """
    stored = {name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    header = {_KEY: json.dumps({"meta": meta, "checksum": _checksum(stored, json.dumps(meta))})}
    with atomic_write(path, "wb") as file:
        file.write(to_bytes(stored, header))


def load(path: str | os.PathLike[str], expect: Mapping[str, Any] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save` wrote.

    Args:
        path: File to read.
        expect: Entries that ``meta`` must have, such as ``{"architecture": "vit"}``.

    Returns:
        The tensors, on the CPU, and ``meta``.

    Raises:
        CheckpointError: The file is missing, damaged (a single flipped bit is detected), from another program, or not as expected.
    """
    require_regular(path, "checkpoint", "give the path of a .safetensors file made by a ttcfast command", CheckpointError)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = (file.metadata() or {}).get(_KEY)
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged or no safetensors file ({error}); copy or make it again") from error
    if header is None:
        raise CheckpointError(f"checkpoint {path} was not written by ttcfast (its header has no {_KEY!r} entry); give one that was")
    try:
        entry = parse_json(header)
        whole = entry["checksum"] == _checksum(tensors, json.dumps(entry["meta"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"checkpoint {path} is damaged (its checksum does not fit its contents); copy or make it again")
    if not isinstance(entry["meta"], dict):
        raise CheckpointError(f"checkpoint {path} describes nothing (its meta is no mapping); give one that a ttcfast command wrote")
    for key, wanted in (expect or {}).items():
        found = entry["meta"].get(key)
        if found != json.loads(json.dumps(wanted)):  # as JSON has it, with lists for tuples
            raise CheckpointError(f"checkpoint {path} has {key} {found!r}; expected {wanted!r}: give a checkpoint of that {key}")
    return tensors, entry["meta"]


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write a loop's ``state`` (JSON values, tuples and tensors, nested), atomically; ``meta`` as in :func:`save`."""
    tensors: dict[str, Tensor] = {}
    skeleton = _take_tensors(dict(state), "state", tensors)
    save(path, tensors, {**meta, "state": skeleton})


def load_state(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state that :func:`save_state` wrote, with its tensors on the CPU, and ``meta``.

    Raises:
        CheckpointError: As for :func:`load`, or the file holds no such state.
    """
    tensors, meta = load(path)
    if "state" not in meta:
        raise CheckpointError(f"checkpoint {path} holds no state to go on from; give a folder that this command wrote, or an empty one")
    with entries_of(path, "a state to go on from"):
        return _put_tensors(meta.pop("state"), tensors), meta


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load ``tensors`` into ``model``; every name and shape must fit.

    Raises:
        CheckpointError: They do not fit, or a weight is not finite; the message names the first differences.
    """
    own = model.state_dict()
    missing = [f"{name} is missing" for name in own if name not in tensors]
    surplus = [f"{name} is not in the model" for name in tensors if name not in own]
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, the model's is {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    kinds = [
        f"{name} is {tensors[name].dtype}, the model's is {own[name].dtype}"
        for name in own
        if name in tensors and _kind(tensors[name]) != _kind(own[name])
    ]
    if wrong := missing + surplus + shapes + kinds:
        raise CheckpointError(f"checkpoint {path} is of another architecture: {'; '.join(wrong[:3])} ({len(wrong)} differences)")
    if broken := [name for name, weight in model.named_parameters() if weight.is_floating_point() and not tensors[name].isfinite().all()]:
        raise CheckpointError(
            f"checkpoint {path} holds weights that are not finite ({', '.join(broken[:3])}): its training diverged; give an earlier one, "
            "or train again with a lower lr"
        )
    model.load_state_dict(dict(tensors))


def save_training(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any],
    *,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write all that an exact resume needs into one file: weights, optimizer, random states, and ``extra``.

    Args:
        path: File to write.
        model: Model whose state dict is stored.
        optimizer: Optimizer whose state dict is stored, moments and step counts bit for bit.
        extra: Other state of the loop (step, best score, scheduler, generators), as nested JSON values, tuples and tensors.
        meta: As in :func:`save`; ``expect`` checks it when loading.

    The states of torch (CPU and every CUDA device), numpy and ``random`` are stored too.
    """
    state = {"optimizer": optimizer.state_dict(), "random": _random_states(), "extra": dict(extra)}
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    skeleton = _take_tensors(state, "training", tensors)
    save(path, tensors, {**(meta or {}), "training": skeleton})


def load_training(
    path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, expect: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Put ``model``, ``optimizer`` and the random states back as :func:`save_training` found them, and return its ``extra``.

    Raises:
        CheckpointError: As for :func:`load`; or the file holds no training state, or that of another model or optimizer.
    """
    tensors, meta = load(path, expect)
    if "training" not in meta:
        raise CheckpointError(f"checkpoint {path} holds weights alone, no training state; give the one that the training run resumes from")
    with entries_of(path, "a training state"):
        state = _put_tensors(meta["training"], tensors)
        saved, randoms, extra = state["optimizer"], state["random"], state["extra"]
        moments = [value for held in saved["state"].values() for value in held.values() if torch.is_tensor(value) and value.ndim]
        if odd := [value.dtype for value in moments if not value.is_floating_point()]:  # the optimizer would cast them
            raise ValueError(f"moments of {odd[0]}")
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    load_weights(model, weights, path)
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} has another optimizer's state ({error}); resume with the same settings") from error
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if torch.is_tensor(value) and value.ndim and value.shape != parameter.shape:
                raise CheckpointError(
                    f"checkpoint {path} has another optimizer's state ({name} is {tuple(value.shape)} for a weight of "
                    f"{tuple(parameter.shape)}); resume with the same settings"
                )
    with entries_of(path, "a training state"):
        _set_random_states(randoms)
    return extra


@contextlib.contextmanager
def entries_of(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn errors from missing or mistyped entries of the checkpoint ``path`` within the block into one ``CheckpointError``.

    Args:
        what: Object that the file should describe, such as ``"a surrogate"``.
    """
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(
            f"checkpoint {path} does not describe {what}: it has no {error}; give one that a ttcfast command wrote"
        ) from error
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {path} does not describe {what} ({text}); give one that a ttcfast command wrote") from error


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _checksum(tensors: Mapping[str, Tensor], meta: str) -> int:
    total = zlib.crc32(meta.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode(), total)
        if tensor.numel():
            total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), total)  # type: ignore[arg-type]  # numpy has a buffer
    return total


def _take_tensors(value: Any, path: str, found: dict[str, Tensor]) -> Any:
    """``value`` as JSON: tensors go to ``found`` and leave their name, tuples and dicts keep their kind (an optimizer's keys are ints)."""
    if torch.is_tensor(value):
        found[path] = value
        return {"tensor": path}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        items = [_take_tensors(item, f"{path}.{i}", found) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        return {"dict": [[key, _take_tensors(item, f"{path}.{key}", found)] for key, item in value.items()]}
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    raise TypeError(f"{path} is a {type(value).__name__}; a training state holds JSON values, tuples and tensors")


def _put_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_put_tensors(item, tensors) for item in content)
    return {key: _put_tensors(item, tensors) for key, item in content}


def _random_states() -> dict[str, Any]:
    name, words, *rest = np.random.get_state()  # noqa: NPY002  # the global generator is the one to keep
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, [int(word) for word in words], *rest),
        "python": random.getstate(),
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    random.setstate(states["python"])
