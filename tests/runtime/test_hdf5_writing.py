"""Writers on a disk that ends anywhere in the file: one clear line, and nothing half written."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.full_disk import outcomes
from ttcfast.runtime.errors import OutputError
from ttcfast.runtime.hdf5_writing import edit_hdf5, new_hdf5
from ttcfast.runtime.steady import steady

# job: (bytes of the whole file at least, what the message names)
JOBS = {
    "generate": (80_000, "riemann4_0000.hdf5"),
    "triplets": (98_304, "triplets.hdf5.partial"),
    "shard": (60_000, "a.pt"),
    "figure": (4_200, "a.png"),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_disk_that_ends_anywhere_is_one_line(job, tmp_path):
    whole, named = JOBS[job]
    *small, enough = outcomes(job, tmp_path, [1, 511, 2_048, 4_096, *range(4_099, whole, whole // 7), 10_000_000])
    for found in small:
        assert found["status"] == 1, found
        assert found["said"].count("\n") == 1 and found["said"].startswith("ttcfast: cannot write "), found
        assert named in found["said"] and "File too large; free some space" in found["said"], found
        assert not found["left"], found
    assert enough["status"] == 0 and not enough["said"] and any(Path(left).name in named for left in enough["left"])


def test_too_little_memory_is_one_line(tmp_path):
    for found in outcomes("memory:large", tmp_path, [4_000_000, 16_000_000, 32_000_000]):
        assert found["status"] == 1 and found["said"].count("\n") == 1, found
        assert "out of memory" in found["said"] and "lower what is held at once (batch, per_file, grid" in found["said"], found
        assert not found["left"], found


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.hdf5"
    with new_hdf5(path) as file:
        file["x"] = np.arange(1000)
    with pytest.raises(RuntimeError), new_hdf5(path) as file:
        file["x"] = np.zeros(3)
        raise RuntimeError
    with edit_hdf5(path, "r+") as file:
        file.attrs["more"] = 1
    with h5py.File(path) as file:
        assert np.array_equal(file["x"], np.arange(1000)) and file.attrs["more"] == 1
    assert os.listdir(tmp_path) == ["a.hdf5"]
    with pytest.raises(OutputError, match="it is a folder"), new_hdf5(tmp_path):
        pass


def test_a_steady_file_tells_its_first_error_at_the_end():
    with open("/dev/full", "wb", buffering=0) as full:
        with pytest.raises(OSError, match="No space left on device"), steady(full) as file:
            assert file.write(b"abc") == 3
            assert file.error is not None and file.write(b"more") == 4
        with pytest.raises(OSError, match="No space left on device"), steady(full) as file:
            file.write(b"abc")
            raise RuntimeError("what the library makes of it")
        with pytest.raises(RuntimeError, match="its own"), steady(full):
            raise RuntimeError("its own")
