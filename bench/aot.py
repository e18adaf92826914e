"""Compile every Triton kernel for the supported GPUs, without a GPU: ``python -m bench.aot``.

Prints registers, spills and shared memory of each kernel, and its instructions in all and in its longest loop, and exits with 1 if one
exceeds its limit or does not compile. Must run in a process of its own, since Triton decides at import whether to interpret kernels.
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
    printed = _printed(compiled, "cuobjdump", "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {printed!r}")
    registers, stack, static, local = map(int, found.groups())
    return Usage(registers, stack + local, static + compiled.metadata.shared)


def instructions_of(compiled: Any) -> tuple[int, int]:
    """Return the issue slots of a warp that passes every instruction once, and of those the ones in the longest loop (0 without a loop).

    Leaves out no-ops and the slow paths that are called.
    """
    count, longest, labels = 0, 0, dict[str, int]()
    for line in _printed(compiled, "nvdisasm", "-c").split(".weak")[0].splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?(?!NOP)[A-Z]\w*(.*)", line):
            target = re.search(r"`\((\.L_x_\d+)\)", found[1])
            start = labels.get(target[1]) if target else None
            if start == count:  # the jump to itself behind the end
                continue
            count += 1
            if start is not None:
                longest = max(longest, count - start)
    return count, longest


def _printed(compiled: Any, tool: str, option: str) -> str:
    """Run one of the CUDA tools that Triton brings on the machine code."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([str(path), option, file.name], capture_output=True, text=True, check=True).stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, 90 for sm_90")
    chosen = parser.parse_args(arguments).arch
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set, so Triton would interpret the kernels; unset it to compile them", file=sys.stderr)
        return 2
    failures = 0
    print(f"{'kernel':<60}{'arch':>7}{'registers':>11}{'spills':>8}{'shared':>8}{'instructions':>14}{'in loop':>9}")
    for name, kernel, signature, constants, warps, limit in variants():
        for architecture in chosen:
            compiled = compile_for(architecture, kernel, signature, constants, warps)
            usage, instructions = usage_of(compiled), instructions_of(compiled)
            over = usage.over(limit)
            failures += bool(over)
            row = f"{name:<60}{f'sm_{architecture}':>7}{usage.registers:>11}{usage.spill_bytes:>8}{usage.shared_bytes:>8}"
            row += f"{instructions[0]:>14}{instructions[1]:>9}"
            print(f"{row}  {'FAILED: ' + over if over else ''}".rstrip(), flush=True)
    print(f"{failures} over their limits" if failures else "all within their limits")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
