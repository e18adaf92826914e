"""Launches Triton kernels on the device that holds their tensors, without fused multiply-adds.

Triton's own launch binds, classifies and hashes every argument anew: 15 us of Python for 45 of them. A launch whose sizes, constants,
dtypes and alignments recur is found here by those alone, and only the addresses are new.
"""

from contextlib import nullcontext
from functools import lru_cache
from threading import get_ident

import torch

MOST_KNOWN = 4096  # launches whose compiled kernel is remembered, each with its key of some kilobytes; then all are forgotten

_known = {}  # by kernel, device and whatever the compiled code depends on: Triton's launcher for this grid, and the constants it is given


def guard(device):
    """Make a CUDA device current, since Triton compiles for the current device and launches on its stream, whatever the pointers."""
    return torch.cuda.device(device) if device.type == "cuda" and torch.cuda.current_device() != device.index else nullcontext()


def submit(kernel, programs, device, *arguments, **options):
    """Launch ``programs`` programs of ``kernel`` on ``device`` without implicit fused multiply-adds, which would change bits.

    ``arguments`` are tensors, numbers and None, the first parameters of the kernel; ``options`` are its constants, the other parameters,
    and Triton's options.
    """
    key, given = [kernel, programs, device, *options.values()], []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            x, dtype = x.data_ptr(), x.dtype
            key += dtype, x % 16 == 0
        else:
            key.append(float if type(x) is float else x)  # a number's type and divisibility are compiled in, a float's value is not
        given.append(x)
    key = tuple(key)
    with guard(device):
        found = _known.get(key)
        if found is None:
            compiled = kernel[(programs,)](*arguments, **options, enable_fp_fusion=False)
            _remember(key, kernel, compiled, programs, options)
        else:
            launcher, constants = found
            launcher(*given, *constants)


def _remember(key, kernel, compiled, programs, options):
    if compiled is None:  # interpreted
        return
    if len(_known) >= MOST_KNOWN:
        _known.clear()
    constants = tuple(options[name] for name in kernel.arg_names if name in options)
    _known[key] = compiled[(programs, 1, 1)], constants


def capturing_on(device):
    """Return whether a CUDA graph is being captured, and the current stream as a number; False and 0 on other devices."""
    if device.type != "cuda":
        return False, 0
    with guard(device):
        return torch.cuda.is_current_stream_capturing(), torch.cuda.current_stream(device).cuda_stream


class Counters:
    """Counters in device memory that are 0 between calls: the last of the programs that count sets them back.

    Calls of one thread on one stream follow each other and share theirs. A CUDA graph may be replayed beside anything, so each of its
    calls has counters of its own for ever, from a reserve that calls outside captures fill; if it is empty, every replay sets some to 0.
    """

    RESERVE = 1 << 16

    def __init__(self):
        self.of_stream, self.reserve, self.kept = {}, {}, []

    def get(self, count, device):
        """Return int32 ``[count]`` or more, at a multiple of 16 bytes, all 0 when the call's first launch starts."""
        capturing, stream = capturing_on(device)
        left = self.reserve.get(device)
        if not capturing:
            if device.type == "cuda" and (left is None or left.numel() < self.RESERVE // 2):
                self.reserve[device] = torch.zeros(self.RESERVE, dtype=torch.int32, device=device)
            key = device, stream, get_ident()
            own = self.of_stream.get(key)
            if own is None or own.numel() < count:
                own = self.of_stream[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
            return own
        if left is None or left.numel() < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        own, self.reserve[device] = left[:count], left[-(-count // 4) * 4 :]
        self.kept.append(own)
        return own


COUNTERS = Counters()


@lru_cache
def capability(device):
    """Return the compute capability of a CUDA device, None for others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def ceil_div(count, size):
    """Return the number of blocks of ``size`` that hold ``count``. ``triton.cdiv`` is 20 times slower, since kernels can call it too."""
    return -(-count // size)


def is_contiguous(sizes, strides):
    """Tell whether the elements of a grid follow each other in memory."""
    expected, contiguous = 1, True
    for size, stride in zip(reversed(sizes), reversed(strides)):
        contiguous &= size == 1 or stride == expected
        expected *= size
    return contiguous
