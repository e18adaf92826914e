"""Launches Triton kernels on the device that holds their tensors, without fused multiply-adds."""

from contextlib import nullcontext

import torch


def guard(device):
    """Make a CUDA device current, since Triton compiles for the current device and launches on its stream, whatever the pointers."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def submit(kernel, programs, device, *arguments, **options):
    """Launch ``programs`` programs of ``kernel`` on ``device`` without implicit fused multiply-adds, which would change bits."""
    with guard(device):
        kernel[(programs,)](*arguments, **options, enable_fp_fusion=False)


def is_contiguous(sizes, strides):
    """Tell whether the elements of a grid follow each other in memory."""
    expected, contiguous = 1, True
    for size, stride in zip(reversed(sizes), reversed(strides)):
        contiguous &= size == 1 or stride == expected
        expected *= size
    return contiguous
