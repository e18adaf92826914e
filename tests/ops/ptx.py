"""Runs the PTX of a Triton kernel in numpy, block by block and all threads in lockstep: what the compiler made, without a GPU.

Covers the instructions of the keyed kernels, each with IEEE rounding; an unknown one raises. ``rsqrt.approx`` is rounded to nearest and
then off by a random number of at most ``ROOT_ULPS`` units in the last place, as no code may rely on its bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
ROOT_ULPS = 2
TYPES = {f"{kind}{8 * size}": np.dtype(f"{code}{size}") for kind, code in zip("busf", "uuif") for size in (2, 4, 8)}
TYPES |= {"pred": np.dtype("u1"), "bf16": np.dtype("u2"), "bf16x2": np.dtype("u4")}


def fma(a: Array, b: Array, c: Array) -> Array:
    """Return a b + c, rounded once: the product of two floats is exact in float64, and a sum rounded to odd there can be rounded again."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    towards = np.where((lost > 0) == (total > 0), 1, -1)
    return np.where((lost != 0) & (bits & 1 == 0), bits + towards, bits).view(np.float64).astype(np.float32)


def to_bfloat16(x: Array) -> Array:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def divide(a: Array, b: Array) -> Array:
    """Divide whole numbers, rounding towards 0."""
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    a, b = a.astype(wide), b.astype(wide)
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)) if wide is np.int64 else a // b


def field(a: Array, start: Array, length: Array) -> Array:
    """Return ``length`` bits from ``start`` as a signed number."""
    left = (32 - start - length).astype(np.int32)
    return (a << left) >> (left + start)


def inverse_root(a: Array) -> Array:
    exact = (1 / np.sqrt(a.astype(np.float64))).astype(np.float32)
    return (exact.view(np.int32) + np.random.default_rng(0).integers(-ROOT_ULPS, ROOT_ULPS + 1, len(a), np.int32)).view(np.float32)


# Instructions on operands that all have the type that ends the name, by the name without it.
SAME_TYPE: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "add.rn": np.add,
    "sub": np.subtract,
    "sub.rn": np.subtract,
    "mul.lo": np.multiply,
    "mul.rn": np.multiply,
    "mad.lo": lambda a, b, c: a * b + c,
    "fma.rn": fma,
    "rsqrt.approx.ftz": inverse_root,
    "neg": np.negative,
    "div": divide,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "bfe": field,
    "setp.lt": np.less,
    "setp.le": np.less_equal,
    "setp.gt": np.greater,
    "setp.ge": np.greater_equal,
    "setp.eq": np.equal,
    "setp.ne": np.not_equal,
}


class Kernel:
    """The first kernel in ``ptx``, for blocks of ``threads`` threads."""

    def __init__(self, ptx: str, threads: int) -> None:
        head, body = ptx.split("\n{", 1)
        self.parameters = re.findall(r"\w+_param_\d+", head)
        self.threads = threads
        self.code: list[tuple[str, str, list[str]]] = []  # predicate, name, operands
        self.labels: dict[str, int] = {}
        text = re.sub(r"//.*|\.loc.*", "", body.split("$L__func_end")[0])
        for statement in re.split(r";|(?<=:)\n", text):
            *labels, statement = re.split(r"(\$\w+):", statement.lstrip("{} \n\t").rstrip())
            self.labels |= dict.fromkeys(filter(lambda label: label.startswith("$"), labels), len(self.code))
            if (statement := statement.lstrip("{} \n\t")) and statement[0] != ".":
                found = re.fullmatch(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*)", statement, re.DOTALL)
                assert found is not None, statement
                self.code.append((found[1] or "", found[2], re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[3])))

    def run(self, block: int, memory: Array, arguments: Sequence[int]) -> None:
        """Run one block on ``memory``, bytes from the address 0. Triton adds two arguments, of scratch memory that is not used."""
        Block(self, block, memory, dict(zip(self.parameters, [*arguments, 0, 0]))).run()


class Block:
    """Registers of all threads of a block, each as 64 bits, and its shared memory."""

    def __init__(self, kernel: Kernel, block: int, memory: Array, arguments: dict[str, int]) -> None:
        self.kernel, self.arguments = kernel, arguments
        self.memory = {"global": memory, "shared": np.zeros(48 * 1024, np.uint8)}
        self.registers = {"%tid.x": np.arange(kernel.threads, dtype=np.uint64), "%ctaid.x": self.all(block), "global_smem": self.all(0)}

    def all(self, value: int) -> Array:
        return np.full(self.kernel.threads, value % 2**64, np.uint64)

    def bits(self, operand: str) -> Array:
        if operand[0] in "%g" or operand in self.registers:
            return self.registers[operand]
        return self.all(int(re.sub("^0[fd]", "0x", operand), 0))

    def read(self, operand: str, kind: str) -> Array:
        dtype = TYPES[kind]
        return self.bits(operand).astype(f"u{dtype.itemsize}").view(dtype)

    def write(self, operand: str, kind: str, value: Array, where: Array) -> None:
        dtype = TYPES[kind]
        bits = value.astype(dtype, copy=False).view(f"u{dtype.itemsize}").astype(np.uint64)
        self.registers[operand] = np.where(where, bits, self.registers.get(operand, bits))

    def run(self) -> None:
        at = 0
        while at < len(self.kernel.code):
            predicate, name, operands = self.kernel.code[at]
            where = np.ones(self.kernel.threads, bool)
            if predicate:
                where = (self.bits(predicate.strip("!")) != 0) ^ (predicate[0] == "!")
            at += 1
            if name == "ret":
                return
            if name.split(".")[0] == "bra":
                if where.any() != where.all():
                    raise NotImplementedError(f"threads part at {operands[0]}")
                at = self.kernel.labels[operands[0]] if where.all() else at
            elif name.split(".")[0] != "bar":
                self.step(name, operands, where)

    def step(self, name: str, operands: list[str], where: Array) -> None:
        """Run one instruction in the threads ``where``."""
        base, kind = name.rsplit(".", 1)
        first = base.split(".")[0]
        if first in ("ld", "st"):
            self.move(base, kind, operands, where)
        elif first == "mov":
            self.pack(operands, kind, where)
        elif base in SAME_TYPE:
            result = SAME_TYPE[base](*(self.read(operand, kind) for operand in operands[1:]))
            self.write(operands[0], "pred" if first == "setp" else kind, result & 1 if kind == "pred" else result, where)
        elif first in ("shl", "shr"):
            value = self.read(operands[1], kind)
            by = self.bits(operands[2]).astype(value.dtype)
            self.write(operands[0], kind, value << by if first == "shl" else value >> by, where)
        elif base in ("mul.wide", "mad.wide"):
            wide = kind.replace("32", "64")
            result = self.read(operands[1], kind).astype(TYPES[wide]) * self.read(operands[2], kind)
            self.write(operands[0], wide, result + self.read(operands[3], wide) if base == "mad.wide" else result, where)
        elif first == "selp":
            self.write(operands[0], kind, np.where(self.bits(operands[3]) != 0, *(self.read(o, kind) for o in operands[1:3])), where)
        elif first == "cvt":
            self.convert(name.split(".")[-2:], operands, where)
        else:
            raise NotImplementedError(f"{name} {', '.join(operands)}")

    def convert(self, kinds: list[str], operands: list[str], where: Array) -> None:
        """Convert to the first kind from the second."""
        to, given = kinds
        values = [self.read(o, given) for o in operands[1:]]
        if given == "bf16":
            values = [(values[0].astype(np.uint32) << 16).view(np.float32)]
        if to == "bf16x2":
            values = [to_bfloat16(values[0]).astype(np.uint32) << 16 | to_bfloat16(values[1])]
        elif to == "bf16":
            values = [to_bfloat16(values[0])]
        self.write(operands[0], to, values[0].astype(TYPES[to]), where)

    def pack(self, operands: list[str], kind: str, where: Array) -> None:
        """Copy, or split into or join from the names in braces, lowest bits first."""
        to, given = operands
        size = 8 * TYPES[kind].itemsize
        if to[0] == "{":
            names = names_in(to)
            part = size // len(names)
            for i, name in enumerate(names):
                self.write(name, f"b{part}", self.bits(given) >> np.uint64(part * i), where)
        else:
            names = names_in(given)
            part = size // len(names)
            joined = sum(
                (self.read(name, f"b{part}").astype(np.uint64) << np.uint64(part * i) for i, name in enumerate(names)), self.all(0)
            )
            self.write(to, f"b{size}", joined, where)

    def move(self, base: str, kind: str, operands: list[str], where: Array) -> None:
        """Load or store."""
        if base.startswith("ld.param"):
            return self.write(operands[0], kind, self.all(self.arguments[operands[1].strip("[]")]), where)
        memory = self.memory[base.split(".")[1]]
        value, place = operands if base.startswith("ld") else operands[::-1]
        register, offset = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(\d+)\s*)?\]", place).groups()  # type: ignore[union-attr]
        size = TYPES[kind].itemsize
        for i, name in enumerate(names_in(value)):
            at = self.bits(register)[where].astype(np.int64)[:, None] + int(offset or 0) + size * i + np.arange(size)
            if base.startswith("st"):
                memory[at] = self.bits(name)[where].view(np.uint8).reshape(-1, 8)[:, :size]
            else:
                loaded = np.zeros((self.kernel.threads, 8), np.uint8)
                loaded[where, :size] = memory[at]
                self.write(name, f"b{8 * size}", loaded.view(np.uint64)[:, 0], where)


def names_in(operand: str) -> list[str]:
    return re.findall(r"[^\s,{}]+", operand)
