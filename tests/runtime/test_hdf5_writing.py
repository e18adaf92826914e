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


MEMORY = "memory:large"  # first, before the others leave free memory behind
LIMITS = {MEMORY: [4_000_000, 16_000_000, 32_000_000]}
LIMITS |= {job: [1, 511, 2_048, 4_096, *range(4_099, whole, whole // 7), 10_000_000] for job, (whole, _) in JOBS.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return outcomes(tmp_path_factory.mktemp("jobs"), LIMITS)


@pytest.mark.parametrize("job", JOBS)
def test_a_disk_that_ends_anywhere_is_one_line(job, found):
    named, (*small, enough) = JOBS[job][1], found[job]
    for one in small:
        assert one["status"] == 1, one
        assert one["said"].count("\n") == 1 and one["said"].startswith("ttcfast: cannot write "), one
        assert named in one["said"] and "File too large; free some space" in one["said"], one
        assert not one["left"], one
    assert enough["status"] == 0 and not enough["said"] and any(Path(left).name in named for left in enough["left"])


def test_too_little_memory_is_one_line(found):
    for one in found[MEMORY]:
        assert one["status"] == 1 and one["said"].count("\n") == 1, one
        assert "out of memory" in one["said"] and "lower what is held at once (batch, per_file, grid" in one["said"], one
        assert not one["left"], one


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
