"""Tensors of the fake device, what they mix with, and what makes the host wait; see ``tests/fake_cuda.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CUDA = torch.device("cuda", 0)
WAITS = {
    "aten::_linalg_check_errors": "linalg's check for errors",
    "aten::_local_scalar_dense": "item",
    "aten::_unique2": "unique",
    "aten::bincount": "bincount",
    "aten::equal": "equal",
    "aten::isin": "isin",  # small sets of test values need no wait; others are sorted and made unique
    "aten::masked_select": "masked_select",
    "aten::nonzero": "nonzero",
    "aten::unique_consecutive": "unique",
    "aten::unique_dim": "unique",
}
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
FILLS = ("aten::masked_fill", "aten::masked_fill_", "aten::fill_")
_torch: Any = torch._C  # parts without annotations


class CudaTensor(Tensor):
    """A tensor on the device; ``held`` is its memory."""

    held: Tensor
    __torch_function__ = _torch._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Any:
        made = torch.Tensor._make_subclass(cls, held)
        made.held = held  # type: ignore[attr-defined]
        return made

    def _put(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = memory(value)

    data = property(lambda self: CudaTensor(self.held.data), _put)  # as torch does, a tensor's memory can be exchanged
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} of a tensor of the fake device outside of its block; read it by on_host")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({self.held!r})"

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def get_device(self) -> int:
        return 0

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    __array__: Any = numpy

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = copy = CudaTensor(self.held.clone()).requires_grad_(self.requires_grad)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a CUDA tensor is pickled, which copies it to the host; send tensors by torch.distributed, or save a copy")


def on_host(value: Any) -> Any:
    """The same value with all tensors in it on the host, which no count notices."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: on_host(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, (tuple, list)):
        return _like(value, [on_host(item) for item in value])
    return memory(value).detach() if isinstance(value, Tensor) else value


def reason_to_wait(func: Any, args: Any, kwargs: Any) -> str | None:
    """Why the host waits for this operation, apart from copies; None where it does not."""
    name = func._schema.name
    if name in INDEXED:
        indices = [x for x in args[1] if x is not None]
        if any(not isinstance(x, CudaTensor) for x in indices):
            return "an index copied to the device"
        filled = len(args) > 2 and args[2].numel() == 1 and not isinstance(args[2], CudaTensor)  # is masked_fill_
        return "a mask as an index" if any(x.dtype in (torch.bool, torch.uint8) for x in indices) and not filled else None
    if name == "aten::repeat_interleave" and func._schema.overload_name == "Tensor" and kwargs.get("output_size") is None:
        return "repeat_interleave by a tensor"
    if name in FILLS[:2] and isinstance(args[2], CudaTensor):
        return "masked_fill by a tensor"
    return WAITS.get(name)


def require_one_device(func: Any, args: Any, given: list[Tensor]) -> None:
    """Raise as torch does for tensors of the device beside ones of the host."""
    host, name = [x for x in given if not isinstance(x, CudaTensor)], func._schema.name
    if not host or name in ("aten::copy_", "aten::_to_copy"):
        return
    if name in INDEXED:
        if not isinstance(args[0], CudaTensor):
            raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor (cpu) (in {func})")
        host = [x for x in args[2:3] if not isinstance(x, CudaTensor)]
    first = func._schema.arguments[0].alias_info
    written = first is not None and first.is_write and not isinstance(args[0], CudaTensor)
    numbers = torch.Tag.pointwise in func.tags or name in INDEXED or name in FILLS  # take numbers as tensors of the host without axes
    if numbers and not written and all(x.ndim == 0 for x in host):
        return
    if _torch._current_graph_task_id() != -1 and not any(bool(x.any()) for x in host):
        return  # a gradient that autograd made up of nothing, on the device that the fake tensors have for C++
    shapes = ", ".join(str(tuple(x.shape)) for x in host)
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (in {func}, host: {shapes})"
    )


def require_device(kernel: Any, args: Any) -> None:
    """Raise as Triton does for a kernel that is given memory of the host."""
    for i, x in enumerate(args):
        if isinstance(x, Tensor) and not isinstance(x, CudaTensor):
            raise ValueError(f"Pointer argument (at {i}) cannot be accessed from Triton (cpu tensor?) in {kernel.__name__}")


def tensors(values: Any) -> list[Tensor]:
    """All tensors in arguments or results of an operation."""
    if isinstance(values, Tensor):
        return [values]
    found = []
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, (tuple, list)) else ():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list, dict)):
            found += tensors(value)
    return found


def each(function: Callable[[Any], Any], values: Any) -> Any:
    """The same nesting with ``function`` applied to every tensor; torch's own trees would take most of the time of small operations."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, (tuple, list)):
        return _like(values, [each(function, value) for value in values])
    return {name: each(function, value) for name, value in values.items()} if isinstance(values, dict) else values


def memory(values: Any) -> Any:
    """The same nesting with the memory of the device's tensors in their place."""
    return each(lambda x: x.held if isinstance(x, CudaTensor) else x, values)


def _like(values: Any, items: list[Any]) -> Any:
    return type(values)(*items) if hasattr(values, "_fields") else type(values)(items)
