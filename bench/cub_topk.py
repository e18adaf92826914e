"""CUB's DeviceTopK as a peer, compiled on first use by nvcc from the headers of the wheel ``nvidia-cuda-cccl`` and called via ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).resolve().with_suffix(".cu")
HEADER = "cub/device/device_topk.cuh"


def headers() -> Path | None:
    """Return the wheel's include folder if it holds DeviceTopK and nvcc is available, otherwise None."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    found = [path.parents[2] for folder in folders for path in folder.glob(f"cu*/include/cccl/{HEADER}")]
    return found[0] if found and shutil.which("nvcc") else None


@cache
def _library() -> ctypes.CDLL:
    major, minor = torch.cuda.get_device_capability()
    library = Path(tempfile.mkdtemp(prefix="cub_topk")) / "cub_topk.so"
    flags = ["-std=c++17", "-O3", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC", f"-I{headers()}"]
    subprocess.run(["nvcc", *flags, str(SOURCE), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return values and positions of the k largest of ``scores [1, n]`` float32, best first. Ties are broken arbitrarily."""
    values = scores.new_empty(k)
    positions = torch.empty(k, dtype=torch.int32, device=scores.device)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (scores, values, positions)]
    stream, bytes_needed = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), ctypes.c_size_t(0)
    storage: Tensor | None = None
    for _ in range(2):  # the first call returns the size of the workspace for the second
        place = ctypes.c_void_p(None if storage is None else storage.data_ptr())
        status = _library().cub_topk(
            pointers[0], ctypes.c_int(scores.shape[1]), ctypes.c_int(k), *pointers[1:], place, ctypes.byref(bytes_needed), stream
        )
        if status != 0:
            raise RuntimeError(f"cub::DeviceTopK returned the CUDA error {status}")
        storage = torch.empty(max(1, bytes_needed.value), dtype=torch.uint8, device=scores.device)
    ordered = values.sort(descending=True)
    return ordered.values[None], positions[ordered.indices].long()[None]
