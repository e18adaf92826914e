"""Files that we write carry checksums: a flipped bit is one clear error or changes nothing that is read."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tests.flips import unnoticed
from ttcfast.data import TrajectoryFile, write_well
from ttcfast.data.well_layout import CHECKSUM
from ttcfast.runtime.errors import DataError
from ttcfast.spec import StateSpec


@pytest.fixture(params=[None, "gzip"])
def path(request, tmp_path) -> Path:
    u = torch.rand(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 1
    made = {"boundary": ("periodic", "reflecting"), "parameters": {"seed": 3, "preset": "x"}, "compression": request.param}
    write_well(tmp_path / "a.hdf5", u, [0.0, 0.1, 0.2], StateSpec.euler2d(gamma=1.3), dataset_name="ours", **made)
    return tmp_path / "a.hdf5"


def everything(path: Path) -> tuple:
    file = TrajectoryFile(path)
    try:
        spec = file.spec
        said = (spec.gamma, spec.cell_volume, spec.periodic, spec.closed, file.shape, tuple(file.times.tolist()), str(file.parameters))
        return (*said, *(file[i].numpy().tobytes() for i in range(len(file))))
    finally:
        file.close()


def test_a_flipped_bit_is_noticed(path):
    assert unnoticed(path, lambda: everything(path), 250) == []
    assert everything(path)[0] == 1.3


def test_fields_and_axes_have_hdf5s_checksums(path):
    with h5py.File(path) as file:
        bare: list[str] = []
        file.visititems(lambda name, item: bare.append(name) if isinstance(item, h5py.Dataset) and not item.fletcher32 else None)
        assert bare == ["scalars/gamma"]  # one number has no chunks; the header's checksum covers it


@pytest.mark.parametrize("change", ["scalars/gamma", "dimensions/x", "attribute", "boundary"])
def test_a_header_that_was_changed_is_refused(path, change):
    with h5py.File(path, "r+") as file:
        if change == "attribute":
            file.attrs["simulation_parameters"] = '{"seed": 4}'
        elif change == "boundary":
            file["boundary_conditions/y_wall"].attrs["bc_type"] = "OPEN"
        else:
            file[change][...] = file[change][...] * 1.001
    said = r"a\.hdf5 is damaged .*: an attribute, axis or scalar has changed since it was written .* remove that attribute if the change"
    with pytest.raises(DataError, match=said):
        TrajectoryFile(path)
    with h5py.File(path, "r+") as file:
        del file.attrs[CHECKSUM]
    assert len(TrajectoryFile(path)) == 2


def test_a_file_that_a_tool_has_packed_again_is_read(path):
    before = everything(path)
    with h5py.File(path) as file, h5py.File(path.with_name("b.hdf5"), "w") as other:
        file.copy("/", other, "all")
        for name in list(other["all"]):
            other.move(f"all/{name}", name)
        other.attrs.update(dict(file.attrs))
        del other["all"]
        values = np.asarray(other["t0_fields/density"])
        attributes = dict(other["t0_fields/density"].attrs)
        del other["t0_fields/density"]
        other["t0_fields/density"] = values
        other["t0_fields/density"].attrs.update(attributes)
    assert everything(path.with_name("b.hdf5")) == before


def test_a_file_of_an_older_version_opens_and_says_that_it_has_none(path, caplog):
    before = everything(path)
    assert not caplog.records
    with h5py.File(path, "r+") as file:
        del file.attrs[CHECKSUM]
    with caplog.at_level("INFO"):
        assert everything(path) == before
    assert "a.hdf5 was written by an older ttcfast without checksums: bits that flip in it go unnoticed" in caplog.text
    assert [record.levelname for record in caplog.records] == ["INFO"]
