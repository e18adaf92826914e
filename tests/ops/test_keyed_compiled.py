"""What Triton makes of the keyed kernels for a GPU, run in numpy: the bits of the C++ side, with few instructions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.ptx import Kernel
from ttcfast.ops import add_noise, keyed, keyed_dropout, native, normal, registry
from ttcfast.spec import Key

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(registry.interpreting(), reason="under TRITON_INTERPRET kernels are defined so that they cannot be compiled"),
    pytest.mark.skipif(native.available() is not None, reason="the extension is not built"),
]
KEY, ROWS = Key(11, 12, 13), torch.tensor([(3, 0), (3, 1), (3, 2), (7, 2**40), (7, 2**40 + 1), (7, 2**40 + 2)])
SIGMA, P, B = 0.37, 0.3, 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Memory:
    """Bytes that tensors are copied into, with a margin that must not be written."""

    def __init__(self) -> None:
        self.bytes, self.end = np.full(8 << 20, 0xAA, np.uint8), 4096

    def put(self, x: Tensor) -> int:
        """Copy the storage of a tensor and return the address of its first element."""
        raw = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy()
        start, self.end = self.end, -(-(self.end + raw.size + 256) // 256) * 256
        self.bytes[start : start + raw.size] = raw
        return start + x.storage_offset() * x.element_size()


def compiled(name: str) -> tuple[str, list[str], dict[str, int], int]:
    """PTX of a variant, the names of its arguments, its constants and warps."""
    from bench.aot import compile_for
    from ttcfast.kernels import keyed as kernels

    _, kernel, signature, constants, warps, _ = next(v for v in kernels.variants() if v[0].split(",")[0] == name)
    code = compile_for(90, kernel, signature, constants, warps).asm["ptx"]
    return code, [a for a in kernel.arg_names if a not in constants], constants, warps


def words(x: float) -> int:
    return int(np.float64(x).view(np.uint64))


@pytest.mark.parametrize(
    "name",
    [
        *(f"{op} {kind}" for op in ("normal", "add_noise", "keyed_dropout") for kind in ("fp32", "bf16 antithetic 64-bit")),
        *(f"{op} fp32 antithetic strided" for op in ("add_noise", "keyed_dropout")),
        "add_noise bf16",
    ],
)
def test_compiled_kernels_have_the_bits_of_the_cpu(name):
    op, stored, *kind = name.split()
    shape = (3, 21, 33) if kind else (4, 32, 52)  # neither fills its last part; only the second one has aligned rows
    elements, antithetic, dtype = math.prod(shape), bool(kind), DTYPES[stored]
    x = torch.randn(len(ROWS) // (B if op == "add_noise" else 1), *shape).to(dtype)
    if "strided" in kind:
        x = x.mT.contiguous().mT
    expected = {
        "normal": lambda: normal(len(ROWS), shape, key=KEY, rows=ROWS, dtype=dtype, antithetic=antithetic, backend="cpu"),
        "add_noise": lambda: add_noise(x, B, SIGMA, key=KEY, rows=ROWS, antithetic=antithetic, backend="cpu"),
        "keyed_dropout": lambda: keyed_dropout(x, P, key=KEY, rows=ROWS, antithetic=antithetic, backend="cpu"),
    }[op]()
    ptx, names, constants, warps = compiled(name)
    part, repeats = constants["PART"], constants["REPEATS"]
    stream, site = keyed.stream_and_site(KEY, ROWS)
    viewed, sizes, strides = keyed.grid(x)
    memory, out = Memory(), torch.zeros_like(expected)
    place = memory.put(out)
    shares, tiles = (-(-B // repeats), -(-elements // (4 * part))) if op == "add_noise" else (1, -(-elements // (4 * part * repeats)))
    given = {"out": place, "x": memory.put(viewed), "rows": memory.put(ROWS), "stream": memory.put(stream)}
    given |= {"site": site, "elements": elements, "tiles": tiles, "B": B, "shares": shares, "threshold": round(P * 2**32)}
    given |= {"sigma": words(SIGMA), "scale": words(1 / (1 - P)), "x_n": viewed.stride(0), "x_m": viewed.stride(0)}
    given |= dict(zip(("e1", "e2", "x_0", "x_1", "x_2"), (*sizes[1:], *strides)))
    before = memory.bytes.copy()
    kernel = Kernel(ptx, 32 * warps)
    for block in range(len(x) * shares * tiles):
        kernel.run(block, memory.bytes, [given[name] for name in names])
    written = expected.contiguous().view(torch.uint8).numpy().ravel()
    before[place : place + written.size] = written
    assert np.array_equal(memory.bytes, before)


@pytest.mark.parametrize(("op", "elements", "most"), [("normal", 16, 36), ("add_noise", 16, 37), ("keyed_dropout", 8, 17)])
def test_issue_slots_of_an_element_in_the_loop(op, elements, most):
    """With Triton 3.7: 32.9, 33.9 and 15; a tenth more is left to other compilers."""
    from bench.aot import compile_for, instructions_of
    from ttcfast.kernels import keyed as kernels

    variant = next(v for v in kernels.variants() if v[0].startswith(f"{op} fp32, {elements} elements"))
    assert instructions_of(compile_for(90, *variant[1:5]))[1] / elements <= most
