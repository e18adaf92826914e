"""The one way to launch a Triton kernel: on the device that holds its tensors, and with the arithmetic that its text says."""

from contextlib import nullcontext

import torch


def guard(device):
    """Makes a CUDA device the current one: Triton compiles for it and launches on its stream, wherever the pointers point."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def submit(kernel, programs, device, *arguments, **options):
    """So many programs of ``kernel`` on ``device``. No fused multiply-adds but those written down: bits would depend on the compiler."""
    with guard(device):
        kernel[(programs,)](*arguments, **options, enable_fp_fusion=False)


def is_contiguous(sizes, strides):
    """Tell whether the elements of a grid follow each other in memory."""
    expected, contiguous = 1, True
    for size, stride in zip(reversed(sizes), reversed(strides)):
        contiguous &= size == 1 or stride == expected
        expected *= size
    return contiguous
