"""Compile every Triton kernel for the supported GPUs, without a GPU: ``python -m bench.aot``.

Prints registers, spills and shared memory of each kernel, and exits with 1 if one exceeds its limit or does not compile. Must run in a
process of its own, since Triton decides at import whether to interpret kernels.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 100)
MOST_SHARED_BYTES = 48 * 1024  # available to a block on all of these GPUs without opting in to more


@dataclass(frozen=True)
class Usage:
    """Resources that a compiled kernel uses."""

    registers: int
    spill_bytes: int
    shared_bytes: int

    def over(self, limit: int) -> str:
        """Return a message on what exceeds its limit, empty if nothing does. ``limit`` applies to registers."""
        found = []
        if self.registers > limit:
            found.append(f"{self.registers} registers, at most {limit}")
        if self.spill_bytes:
            found.append(f"{self.spill_bytes} bytes spilled, none allowed")
        if self.shared_bytes > MOST_SHARED_BYTES:
            found.append(f"{self.shared_bytes} bytes of shared memory, at most {MOST_SHARED_BYTES}")
        return "; ".join(found)


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Return the variants declared in the files of kernels/, each with its register limit."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        # Files without variants hold device functions that other kernels inline.
        yield from getattr(import_module(f"ttcfast.kernels.{path.stem}"), "variants", tuple)()


def compile_for(architecture: int, kernel: Any, signature: dict[str, str], constants: dict[str, Any], warps: int) -> Any:
    """Compile one kernel with Triton. A type may end in ``:16``, which asserts divisibility by 16, as a launch would detect."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    arguments = {name: "constexpr" if name in constants else signature[name].removesuffix(":16") for name in names}
    promised = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants and signature[name].endswith(":16")
    }
    source = ASTSource(fn=kernel, signature=arguments, constexprs={(names.index(k),): v for k, v in constants.items()}, attrs=promised)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def usage_of(compiled: Any) -> Usage:
    """Parse registers and stack from ``cuobjdump --dump-resource-usage``; shared memory is dynamic, so it comes from Triton."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([str(cuobjdump), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {done.stdout!r}")
    registers, stack, static, local = map(int, found.groups())
    return Usage(registers, stack + local, static + compiled.metadata.shared)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, 90 for sm_90")
    chosen = parser.parse_args(arguments).arch
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set, so Triton would interpret the kernels; unset it to compile them", file=sys.stderr)
        return 2
    failures = 0
    print(f"{'kernel':<56}{'arch':>7}{'registers':>11}{'spills':>8}{'shared':>8}")
    for name, kernel, signature, constants, warps, limit in variants():
        for architecture in chosen:
            usage = usage_of(compile_for(architecture, kernel, signature, constants, warps))
            over = usage.over(limit)
            failures += bool(over)
            row = f"{name:<56}{f'sm_{architecture}':>7}{usage.registers:>11}{usage.spill_bytes:>8}{usage.shared_bytes:>8}"
            print(f"{row}  {'FAILED: ' + over if over else ''}".rstrip(), flush=True)
    print(f"{failures} over their limits" if failures else "all within their limits")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
