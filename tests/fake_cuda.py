"""A CUDA device that is not there, as strict about devices as torch is, which counts how often the host waits for it.

    with FakeCuda() as gpu:
        x = torch.randn(3).to("cuda")
        with gpu.counting() as waits:
            bool((x > 0).any())
        assert waits == {("tests/fake/test_device.py:7", "item"): 1}
    on_host(x)  # the values

Its tensors hold host memory and say ``cuda:0``. Within the block

* mixing them with tensors of the host raises as on a GPU, as do ``numpy()``, a CPU generator, and CUDA indices into a host tensor;
* whatever makes the host wait on a GPU is counted by the innermost line of ttcfast: ``item``, ``bool``, ``nonzero``, masks as indices,
  ``unique``, copies from pageable memory, lists and host tensors as indices, ``synchronize``;
* operations of ttcfast run what is registered for CUDA. With TRITON_INTERPRET=1 Triton's interpreter computes their kernels. Otherwise
  launches are counted and their values come from the C++ implementation, many times faster;
* ``torch.cuda.graph`` records: a wait within it raises, and ``replay`` repeats the operations on the same memory;
* autocast for CUDA is that of the CPU.

What a GPU's results differ in (rounding, speed, races, memory) it does not show, nor devices other than ``cuda:0``, streams, and
gradients through a copy between host and device, which raise.
"""

from __future__ import annotations

import contextlib
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake.tensor import CUDA, CudaTensor, each, memory, on_host, reason_to_wait, require_device, require_one_device, tensors
from ttcfast.kernels import launch
from ttcfast.ops import native

__all__ = ["CudaTensor", "FakeCuda", "on_host"]

HOST = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
OURS, OWN = (f"{ROOT}/ttcfast/", f"{ROOT}/kernels/"), (__file__, CudaTensor.tolist.__code__.co_filename)
_C: Any = torch._C  # parts without annotations


class FakeCuda(TorchDispatchMode):
    """The block in which the device is there.

    Attributes:
        waits: How often the host waited, by place (``"ttcfast/ttc/search.py:100"``) and reason.
        launches: How often each Triton kernel was launched, where none is interpreted.
    """

    _mode_key = _C._TorchDispatchModeKey.FAKE  # torch initialises no CUDA while such a mode is on

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and what would skip it imports the compiler

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[str] = Counter()
        self._graph: Graph | None = None  # being recorded
        self._pinned: dict[int, Tensor] = {}  # by address; kept, so that no other memory gets it
        self._generators: dict[int, Any] = {}  # of the device, by address
        self._patches, self._depth = contextlib.ExitStack(), 0
        self._warns = False  # at every wait

    def __enter__(self) -> FakeCuda:
        if not self._depth:
            for holder, name, value in (*self._of_torch(), *self._of_cuda(), *self._of_triton(), *_of_ttcfast()):
                self._patches.enter_context(patch.object(holder, name, value, create=True))
            for get, set_ in _SETTINGS:
                self._patches.callback(set_, get())
                set_(True)
        super().__enter__()
        self._depth += 1
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            self._patches.close()

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counter[tuple[str, str]]]:
        """Yield a counter that holds, after the block, the waits within it."""
        before, found = self.waits.copy(), Counter[tuple[str, str]]()
        yield found
        found.update(self.waits - before)

    def wait(self, why: str) -> None:
        """Count a wait; raise while a graph is recorded."""
        if self._graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {why} at {_place()} waits for the device")
        self.waits[_place(), why] += 1
        if self._warns:
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=2)

    def _debug_waits(self, mode: int | str) -> None:
        self._warns = mode in (1, "warn")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = tensors((args, kwargs))
        of_device, name = any(isinstance(x, CudaTensor) for x in given), func._schema.name
        if not of_device and not _is_cuda(kwargs.get("device")):
            pinned = kwargs.pop("pin_memory", False)
            out = func(*args, **kwargs)
            return self._pin(out) if pinned else out
        if name.startswith("ttcfast::"):
            return self._operation(func, args, kwargs, given)
        if kwargs.get("generator") is not None and kwargs["generator"]._cdata not in self._generators:
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' (in {func})")
        if of_device:
            require_one_device(func, args, given)
        if name == "aten::copy_" and isinstance(args[0], CudaTensor) != isinstance(args[1], CudaTensor):
            self._copied(args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        elif name == "aten::_to_copy" and not of_device:
            self._copied(args[0], kwargs.get("non_blocking", False))
        elif (why := reason_to_wait(func, args, kwargs)) is not None:
            self.wait(why)
        return self._run(func, args, {**kwargs, "device": HOST} if "device" in kwargs else kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute on the memory. What an operation writes to is returned as the tensor that was given."""
        inner = memory(args), memory(kwargs)
        out = func(*inner[0], **inner[1])
        if torch.Tag.inplace_view in func.tags:  # as squeeze_, which changes no memory
            with _C._DisableTorchDispatch():
                func(*args, **kwargs)
        if self._graph is not None:
            self._graph.add(func, *inner, out)
        known = {id(x.held): x for x in tensors((args, kwargs)) if isinstance(x, CudaTensor)}
        return each(lambda x: known[id(x)] if id(x) in known else CudaTensor(x), out)

    def _operation(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """Run what is registered for CUDA; where its kernels were only counted, the values are those of the C++ implementation."""
        before = self.launches.total()
        with self:
            out = func._op_dk(_C.DispatchKey.CUDA, *args, **kwargs)
        if self.launches.total() == before:
            return out
        if host := [x for x in given if not isinstance(x, CudaTensor)]:
            raise RuntimeError(f"{func} ran on tensors of the device and one of the host, of shape {tuple(host[0].shape)}")
        return self._run(func, tuple("auto" if isinstance(x, str) and x in ("triton", "cuda") else x for x in args), kwargs)

    def _copied(self, source: Tensor, non_blocking: bool) -> None:
        """Count a copy between host and device."""
        if isinstance(source, CudaTensor):
            self.wait("a copy to the host")
        elif not non_blocking or source.untyped_storage().data_ptr() not in self._pinned:
            self.wait("a copy to the device")

    def _pin(self, x: Tensor) -> Tensor:
        if self._graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: pinned memory is allocated at {_place()}")
        self._pinned[x.untyped_storage().data_ptr()] = x
        return x

    def _to(self, x: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        """Return a tensor on the device, or on the host."""
        if _is_cuda(device) == isinstance(x, CudaTensor):
            return x
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("the fake device has no gradient of a copy between host and device; detach() the tensor")
        self._copied(x, non_blocking)
        copy = memory(x).detach().clone()
        if self._graph is not None:
            self._graph.add(torch.clone, (memory(x).detach(),), {}, copy)
        return CudaTensor(copy).requires_grad_(x.requires_grad) if _is_cuda(device) else copy

    def _of_torch(self) -> list[tuple[Any, str, Any]]:
        """What moves tensors and what depends on a device's name, as (holder, name, replacement)."""
        to: Any = torch.Tensor.to
        generators = self._generators

        def moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args and isinstance(args[0], Tensor):
                args = (args[0].device, args[0].dtype, *args[1:])
            options = {"copy": kwargs.pop("copy", False)}
            device, dtype, non_blocking, layout = _C._nn._parse_to(*args, **kwargs)
            x = x if device is None else self._to(x, device, non_blocking)
            options |= {} if layout is None else {"memory_format": layout}
            return to(x, x.dtype if dtype is None else dtype, **options)

        class Generator(torch.Generator):
            def __new__(cls, device: Any = "cpu") -> Any:
                made = super().__new__(cls)
                if _is_cuda(device):
                    generators[made._cdata] = made
                return made

        class Autocast(torch.autocast):
            def __init__(self, device_type: str, dtype: torch.dtype | None = None, **options: Any) -> None:
                super().__init__(_of_host(device_type), torch.float16 if dtype is None and device_type == "cuda" else dtype, **options)

        def by_name(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args: function(*map(_of_host, args))

        def grouped(*args: Any) -> dict[Any, Any]:
            by_device = group(*args)  # C++ takes the fake tensors for the host's
            return {(lists[0][0].device, dtype): (lists, at) for (_, dtype), (lists, at) in by_device.items()}

        group = _C._group_tensors_by_device_and_dtype
        names = ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled")
        return [
            (_C, "_group_tensors_by_device_and_dtype", grouped),
            (torch.Tensor, "to", moved),
            (torch.Tensor, "cuda", lambda x, device=CUDA, non_blocking=False: self._to(x, CUDA, non_blocking)),
            (torch.Tensor, "cpu", lambda x: self._to(x, HOST, False)),
            (torch.Tensor, "pin_memory", lambda x: self._pin(x.clone())),
            (torch, "autocast", Autocast),
            (torch, "Generator", Generator),
            *((torch, name, by_name(getattr(torch, name))) for name in names),
        ]

    def _of_cuda(self) -> list[tuple[Any, str, Any]]:
        """The functions of ``torch.cuda``."""
        about = {"name": "no GPU", "multi_processor_count": 132, "total_memory": 1 << 37, "L2_cache_size": 50 << 20, "major": 9, "minor": 0}
        stream = types.SimpleNamespace(cuda_stream=0, wait_stream=_returning(None), synchronize=lambda: self.wait("synchronize"))
        values: dict[str, Any] = dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True)
        values |= {"device_count": 1, "current_device": 0, "get_device_capability": (9, 0), "get_device_name": about["name"]}
        values |= {"get_device_properties": types.SimpleNamespace(**about), "current_stream": stream, "Stream": stream}
        values |= {"memory_allocated": 1 << 30, "max_memory_allocated": (1 << 30) + (64 << 20), "graph_pool_handle": (0, 0)}
        silent = ("set_device", "set_rng_state_all", "manual_seed", "manual_seed_all", "empty_cache", "reset_peak_memory_stats")
        values |= {"get_rng_state_all": [], **dict.fromkeys(silent)}
        functions: dict[str, Any] = {name: _returning(value) for name, value in values.items()}
        functions |= {name: lambda *_, **__: contextlib.nullcontext() for name in ("device", "stream")}
        functions |= {"synchronize": lambda *_: self.wait("synchronize"), "is_current_stream_capturing": lambda: self._graph is not None}
        functions |= {"CUDAGraph": Graph, "graph": self._recording, "set_sync_debug_mode": self._debug_waits}
        return [(torch.cuda, name, value) for name, value in functions.items()]

    def _of_triton(self) -> list[tuple[Any, str, Any]]:
        """The interpreter gets the memory of a kernel's arguments; other launches are counted."""
        try:
            from triton.runtime import interpreter, jit
        except ImportError:
            return []
        interpreted = interpreter.GridExecutor.__call__

        def on_memory(executor: Any, *args: Any, **kwargs: Any) -> Any:
            require_device(executor.fn, args)
            inner = memory(args), memory(kwargs)
            if self._graph is not None:
                self._graph.add(lambda *a, **k: interpreted(executor, *a, **k), *inner, None)
            return interpreted(executor, *inner[0], **inner[1])

        def counted(kernel: Any, *args: Any, **kwargs: Any) -> None:
            require_device(kernel, args)
            self.launches[kernel.__name__] += 1

        return [(interpreter.GridExecutor, "__call__", on_memory), (jit.JITFunction, "run", counted)]

    @contextlib.contextmanager
    def _recording(self, graph: Graph, **_: Any) -> Iterator[None]:
        self._graph = graph
        try:
            yield
        finally:
            self._graph = None


class Graph:
    """The operations of a block ``torch.cuda.graph``, and the memory that they read and wrote."""

    def __init__(self) -> None:
        self.operations: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def add(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        self.operations.append((func, args, kwargs, out))

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat every operation, and write what it returns to where it was recorded."""
        for func, args, kwargs, out in self.operations:
            for new, recorded in zip(tensors(func(*args, **kwargs)), tensors(out)):
                if new.data_ptr() != recorded.data_ptr():  # neither a view nor written in place
                    recorded.copy_(new)


def _of_ttcfast() -> list[tuple[Any, str, Any]]:
    """An extension that seems to be built for CUDA; its top-k is computed on the host."""
    counters = (launch, "COUNTERS", launch.Counters())  # whose memory is of this device
    if native.available() is not None:
        return [counters]
    built = native.module()
    proxy = types.SimpleNamespace(**{name: getattr(built, name) for name in dir(built) if not name.startswith("__")})
    proxy.topk_cuda_workspaces = _returning((64, 64))
    proxy.topk_cuda = lambda *arguments: built.topk(*arguments[:-3], 1, len(built.cpu_levels) - 1)
    return [counters, (native, "module", _returning(proxy)), (native, "device_info", _returning({"built_with_cuda": True}))]


def _place() -> str:
    """The innermost line of ttcfast, else of this repository."""
    frame, other = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            return f"{file[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
        if not other and file.startswith((f"{ROOT}/tests/", f"{ROOT}/bench/")) and file not in OWN:
            other = f"{file[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return other or "outside of the repository"


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _of_host(value: Any) -> Any:
    return "cpu" if value == "cuda" else value


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


_future: Any = torch.__future__
_SETTINGS = [
    # Parameters become ones of another class on the device, and stay the objects that optimizers know.
    (_future.get_swap_module_params_on_conversion, _future.set_swap_module_params_on_conversion),
    (_C._only_lift_cpu_tensors, _C._set_only_lift_cpu_tensors),  # so that torch.tensor(..., device="cuda") copies where it is seen
]
