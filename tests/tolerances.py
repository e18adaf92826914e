"""How far an implementation may be from the float64 reference, in one table, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """Allowed error: ``relative * abs(expected) + absolute * size``, ``size`` being the sum of the magnitudes that were added."""

    relative: float
    absolute: float


# float32 rounds once per difference, product and addition: with 16 lanes per 4096-cell tile at most 256 additions in a row, whose errors
# of 6e-8 each grow like their square root; 2e-6 leaves room for three channels in one product. bfloat16 inputs are widened exactly and
# accumulated in float32, and the reference reads the same bfloat16 numbers, so they get the same row. float64: the same count at 1.1e-16.
SUMS = {
    torch.float32: Tolerance(relative=2e-6, absolute=1e-6),
    torch.bfloat16: Tolerance(relative=2e-6, absolute=1e-6),
    torch.float64: Tolerance(relative=1e-13, absolute=1e-14),
}

# The plan's formulas in the same dtype: their difference of two integrals loses digits, so float64 alone is compared closely.
SEED = {torch.float64: Tolerance(relative=1e-12, absolute=1e-13), torch.float32: Tolerance(relative=1e-5, absolute=2e-6)}

# Gradients are per cell, not sums; bfloat16 ones are rounded to bfloat16 at the end (2^-9).
GRADIENTS = {
    torch.float32: Tolerance(relative=1e-5, absolute=1e-6),
    torch.bfloat16: Tolerance(relative=4e-3, absolute=1e-6),
    torch.float64: Tolerance(relative=1e-12, absolute=1e-14),
}

# Normals against the float64 definition, in units in the last place of float32: the radius is within 2.3 of them and the sine and cosine
# within 3.3 (every 23rd of all 2^32 integers), and Triton's interpreter rounds each fma twice.
NORMAL_ULPS = 8

# x + sigma z with the backend's own z: one rounding to the dtype; the interpreter rounds the product too. The size is that of x and z.
NOISE = {
    torch.float32: Tolerance(relative=1.2e-7, absolute=3e-8),
    torch.bfloat16: Tolerance(relative=2**-8, absolute=3e-8),
    torch.float64: Tolerance(relative=2.3e-16, absolute=6e-17),
}

# Sums of squares that are exact in float64 and added in float64: at most 2048 additions in a row (32768 elements in 16 lanes), then one per
# chunk, each with an error of 1.1e-16. Squares of float64 numbers are rounded once more.
SQUARES = Tolerance(relative=1e-13, absolute=0.0)


# Vector updates round three or four times per entry; a mean over a group of 12 adds a few more.
UPDATES = {torch.float32: Tolerance(relative=4e-7, absolute=2e-7), torch.float64: Tolerance(relative=1e-15, absolute=4e-16)}

# LayerNorm and Mish: means over up to 1792 entries, a division, an exponential within 2 ulp and ten products; the float32 rounding of
# the normalised value alone moves the result by 6e-8 of its size, a few units. bfloat16 results are rounded once more (2^-9; Triton's
# interpreter cuts instead, 2^-8).
ACTIVATIONS = {
    torch.float32: Tolerance(relative=4e-6, absolute=2e-6),
    torch.bfloat16: Tolerance(relative=8e-3, absolute=1e-5),
    torch.float64: Tolerance(relative=1e-13, absolute=1e-14),
}


def assert_within(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance, size: float = 1.0, what: str = "") -> None:
    """Infinities must be the same ones; the rest within the tolerance."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite]), f"{what}: {actual} is not {expected} where that is not finite"
    error, allowed = (actual - expected).abs()[finite], (tolerance.relative * expected.abs() + tolerance.absolute * size)[finite]
    assert bool((error <= allowed).all()), f"{what}: error {error.max():.3g}, allowed {allowed[error.argmax()]:.3g}"
