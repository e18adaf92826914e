"""What ptxas reports of a kernel is read whole, and a spill or too much shared memory fails the build's check."""

from __future__ import annotations

import pytest

from bench.cuda_usage import Kernel, kernels, main

FINE = """ptxas info    : Compiling entry function '_Zfine' for 'sm_90'
ptxas info    : Function properties for _Zfine
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 49 registers, used 1 barriers, 41032 bytes smem
"""
SPILLING = FINE.replace("_Zfine", "_Zspilling").replace("0 bytes spill stores", "8 bytes spill stores")
LARGE = FINE.replace("_Zfine", "_Zlarge").replace("41032", "50000")
WITHOUT_SHARED = FINE.replace("_Zfine", "_Zwarp").replace(", used 1 barriers, 41032 bytes smem", ", used 0 barriers")


def test_kernels_are_read_whole():
    first, second = kernels(FINE + WITHOUT_SHARED)
    assert first == Kernel(49, 0, 41032, "_Zfine", "sm_90") and second == Kernel(49, 0, 0, "_Zwarp", "sm_90")
    with pytest.raises(ValueError, match="not complete"):
        list(kernels(FINE.replace("Used", "used")))


@pytest.mark.parametrize(
    ("log", "status", "said"),
    [(FINE, 0, "0 over"), (FINE + SPILLING, 1, "8 bytes spilled"), (LARGE, 1, "50000 bytes"), ("", 1, "no kernel")],
)
def test_status(tmp_path, capsys, log, status, said):
    path = tmp_path / "log"
    path.write_text(log)
    assert main(str(path)) == status and said in capsys.readouterr().out
