"""Registers, spills and shared memory of every compiled CUDA kernel: ``python -m bench.cuda_usage BUILD_LOG``.

Reads ptxas' report from a build with ``-DCMAKE_CUDA_FLAGS="-Xptxas -v"``. Exits with 1 if a kernel spills, needs more shared memory than
all of these GPUs provide by default, or needs more registers than two resident blocks per multiprocessor allow.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .aot import Usage

MOST_REGISTERS = 64  # two blocks of 512 threads on a multiprocessor of 65536 registers
ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)' for '(?P<gpu>sm_\w+)'")
SPILLS = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
USED = re.compile(r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?")


@dataclass(frozen=True)
class Kernel(Usage):
    name: str
    gpu: str


def kernels(log: str) -> Iterator[Kernel]:
    """Return the usage of every kernel that ptxas reports in ``log``.

    Raises:
        ValueError: A kernel's report is incomplete.
    """
    for part in re.split(r"(?=Compiling entry function)", log)[1:]:
        entry, spills, used = ENTRY.search(part), SPILLS.search(part), USED.search(part)
        if not entry or not spills or not used:
            raise ValueError(f"ptxas' report on a kernel is not complete: {part[:300]!r}")
        spilled = int(spills["stores"]) + int(spills["loads"])
        yield Kernel(int(used["registers"]), spilled, int(used["shared"] or 0), entry["name"], entry["gpu"])


def main(log: str) -> int:
    found = list(kernels(Path(log).read_text()))
    if not found:
        print(f"no kernel's report in {log}; build anew with TTCFAST_CUDA=ON and CMAKE_CUDA_FLAGS='-Xptxas -v'")
        return 1
    wrong = [(kernel, reason) for kernel in found if (reason := kernel.over(MOST_REGISTERS))]
    for kernel, reason in wrong:
        print(f"{kernel.name} for {kernel.gpu}: {reason}")
    gpus = sorted({kernel.gpu for kernel in found}, key=lambda gpu: int(re.sub(r"\D", "", gpu)))
    registers, shared = max(kernel.registers for kernel in found), max(kernel.shared_bytes for kernel in found)
    print(f"{len(found)} kernels for {', '.join(gpus)}: at most {registers} registers, {shared} bytes of shared memory; {len(wrong)} over")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
