"""Reads triplet files: for each state the best, median and worst of K candidates and all K errors, in one HDF5 file.

The root attributes are ``format``, ``version``, ``complete``, ``surrogate`` (hex), ``spec`` and ``config`` (JSON). The data sets, for ``M``
samples, ``C`` channels and ``*S`` cells, are::

    frames      float32 [M, 6, C, *S]   physical units: state, best, median, worst, deterministic, truth
    errors      float32 [M, K]          MSE of each candidate to the truth; not finite if the candidate is not
    picked      int64   [M, 3]          candidate ids of best, median, worst; -1 if fewer than 3 candidates are finite
    step, trajectory   int64 [M];   on_policy   bool [M]
    normalizer/mean, std, delta_std     float32 [C]
    done        int64   [1]             samples written so far
    sums        uint64  [M, 6]          checksum of each frame (``frame_sums``), verified on every read

Every data set is contiguous and allocated when the file is created, so that an interrupted writer leaves a valid file, and samples are
written and read without HDF5. HDF5's own checksums require chunks and take longer than the reading; ``sums`` replace them, and the
attribute ``checksum`` covers everything else. Files of older versions have neither.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ttcfast.core.normalizer import Normalizer
from ttcfast.runtime import hdf5
from ttcfast.runtime.errors import DataError
from ttcfast.runtime.files import parse_json, strict
from ttcfast.runtime.units import Units
from ttcfast.spec import StateSpec

logger = logging.getLogger(__name__)

FORMAT, VERSION = "ttcfast-triplets", 1
FRAMES = ("state", "best", "median", "worst", "deterministic", "truth")
FILE_NAME = "triplets.hdf5"  # in an output folder
SUFFIXES = (".hdf5", ".h5")
CHECKSUM = "checksum"
_TENSORS = ("boundary_mask", "boundary_value")
HEADER_ERRORS = (KeyError, OSError, ValueError, RuntimeError, TypeError, AttributeError, IndexError)

Place = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class TripletHeader:
    """Metadata of a triplet file.

    Args:
        spec: Layout of the states; ``gamma`` is a number, or one per trajectory.
        normalizer: Normalizer of the surrogate.
        surrogate: Hash of the surrogate, hex (``ttcfast.models.surrogate_hash``).
        config: Settings that made the samples (JSON values), with ``"K"``.
    """

    spec: StateSpec
    normalizer: Normalizer
    surrogate: str
    config: Mapping[str, Any]

    def attributes(self) -> dict[str, str]:
        """Returns the attributes that the file stores."""
        spec = {name: value for name, value in self.spec.to_meta(boundary=True).items() if name not in _TENSORS or value is not None}
        return {"surrogate": self.surrogate, "spec": _dumped(spec), "config": _dumped(self.config)}


class TripletFile:
    """One triplet file, read lazily: small arrays are held in memory, frames are read on access.

    It can be pickled and passed to data-loader workers, each of which opens the file when it reads. Samples with fewer than three finite
    candidates are skipped: ``len``, arrays and indices refer to the usable samples.

    Args:
        path: The file, or the output folder that holds it as ``triplets.hdf5``.

    Attributes:
        spec, normalizer, surrogate, config: See ``TripletHeader``.
        shape: ``(C, *S)`` of each state.
        skipped: Number of samples skipped.
        errors: Errors of all candidates, float32 ``[M, K]``, a numpy array like the following.
        picked: Candidate ids of best, median and worst, int64 ``[M, 3]``.
        step: Time index of each sample, int64 ``[M]``.
        trajectory: Trajectory of each sample, int64 ``[M]``.
        on_policy: Whether the state is from the surrogate's own rollout, bool ``[M]``.

    Raises:
        DataError: The file is missing, unfinished, empty or damaged, is not a triplet file, or stores its values in other files.
    """

    spec: StateSpec
    normalizer: Normalizer
    surrogate: str
    config: dict[str, Any]
    shape: tuple[int, ...]

    def __init__(self, path: Place) -> None:
        self.path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        self._sums: np.ndarray | None = None
        with opened(self.path) as file:
            self.path = Path(os.path.abspath(self.path))
            try:
                self._read_header(file)
            except HEADER_ERRORS as error:
                said = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
                raise DataError(f"triplet file {self.path} is damaged: {said}; make or copy it again") from error
        if not len(self):
            raise DataError(
                f"triplet file {self.path} holds no usable sample ({self.skipped} skipped, whose candidates are not finite); make "
                "it again with a surrogate whose step stays finite"
            )

    @property
    def K(self) -> int:
        """Candidates per state."""
        return int(self.errors.shape[1])

    def __len__(self) -> int:
        return len(self._rows)

    def frames(self, indices: Sequence[int] | Tensor, *, first: int = len(FRAMES), out: Tensor | None = None) -> Tensor:
        """Reads samples ``[m, first, C, *S]`` float32: the first frames of ``FRAMES``, in that order.

        Args:
            indices: Samples, in any order.
            first: Frames of each sample to read.
            out: Contiguous tensor of that shape to read into, which saves a loop the allocation; None allocates one.

        Raises:
            IndexError: There is no such sample.
            ValueError: ``out`` does not match.
            DataError: The frames cannot be read.
        """
        picks = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        if picks.size and not (picks.min() >= 0 and picks.max() < len(self)):
            raise IndexError(f"samples {picks.min()} to {picks.max()} of {len(self)} in {self.path}")
        shape = (len(picks), first, *self.shape)
        out = torch.empty(shape) if out is None else out
        if out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous() or out.device.type != "cpu":
            raise ValueError(f"out is {out.dtype} {tuple(out.shape)} on {out.device}; give contiguous float32 {shape} on the CPU")
        try:
            self._read_into(out, self._rows[picks].tolist())
        except (OSError, RuntimeError) as error:
            raise DataError(f"triplet file {self.path} is damaged ({error}); make or copy it again") from error
        return out

    def _read_into(self, out: Tensor, rows: Sequence[int]) -> None:
        into = out.numpy()
        words, sums = frame_words(into), np.zeros(out.shape[:2], np.uint64)
        with hdf5.held_open(self, self._open) as source:
            data = source["frames"] if isinstance(source, h5py.File) else source
            for place, row in enumerate(rows):
                self._read_sample(data, into[place], row)
                if self._sums is not None:  # while the sample is in the processor's cache
                    np.add.reduce(words[place], axis=1, dtype=np.uint64, out=sums[place])
        if self._sums is not None and (wrong := (sums != self._sums[rows, : out.shape[1]]).any(1)).any():
            raise OSError(f"the checksums of sample {rows[int(wrong.argmax())]} do not match its frames")

    @staticmethod
    def _read_sample(source: h5py.Dataset | _Frames, into: np.ndarray, row: int) -> None:
        if isinstance(source, h5py.Dataset):
            into[:] = source[row, : len(into)]
            return
        # Positioned reads: the page faults of a memory map cost several times the copy.
        stride = into.nbytes // len(into) * len(FRAMES)
        if os.preadv(source.fileno(), [into.data], source.offset + row * stride) != into.nbytes:
            raise OSError(f"it ends before sample {row}")

    def _open(self) -> h5py.File | _Frames:
        """The bytes of the frames, or the HDF5 file if a tool has rewritten them in chunks or another type."""
        file = opened(self.path)
        data = file["frames"]
        offset = data.id.get_offset()
        if offset is None or data.dtype != np.dtype("<f4"):
            return file
        file.close()
        return _Frames(self.path, offset)

    def units(self) -> Units:
        """Returns the time step, cell and gamma of the samples, for ``require_units``."""
        return Units(f"triplet file {self.path}", self.config.get("time_step"), self.spec.cell_volume, self.spec.gamma)

    def fingerprint(self) -> str:
        """Returns a hash of the samples' settings and errors; the errors stand for the frames, which take longer to read."""
        made = {name: value for name, value in self.config.items() if name != "source"}  # a path, not its contents
        digest = hashlib.sha256(_dumped([self.surrogate, made, len(self)]).encode())
        for array in (self.errors, self.trajectory, self.step):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _read_header(self, file: h5py.File) -> None:
        if file.attrs.get("format") != FORMAT:
            raise DataError(
                f"{self.path} holds {', '.join(sorted(file)) or 'nothing'} and is not a triplet file; make it with `ttcfast build_prm_data`"
            )
        if int(file.attrs["version"]) != VERSION:
            raise DataError(f"triplet file {self.path} has version {file.attrs['version']}; this ttcfast reads {VERSION}: make it again")
        if not bool(file.attrs["complete"]):
            progress = f"{int(file['done'][0])} of {file['frames'].shape[0]} samples"
            raise DataError(f"triplet file {self.path} is unfinished ({progress}); run the command that makes it once more")
        self.surrogate, self.config = str(file.attrs["surrogate"]), parse_json(file.attrs["config"])
        self.spec = StateSpec.from_meta(parse_json(file.attrs["spec"]))
        self.normalizer = Normalizer(*(torch.from_numpy(hdf5.array(file[f"normalizer/{n}"])) for n in ("mean", "std", "delta_std")))
        frames = file["frames"]
        for name, kinds in (("frames", "f"), ("errors", "f"), ("picked", "iu"), ("step", "iu"), ("trajectory", "iu"), ("on_policy", "b")):
            if file[name].dtype.kind not in kinds:
                raise ValueError(f"{name} is of {file[name].dtype}, which `ttcfast build_prm_data` does not write")
        if frames.ndim < 4 or frames.shape[1] != len(FRAMES) or file["errors"].shape[:1] != frames.shape[:1]:
            raise ValueError(f"frames has shape {frames.shape} and errors {file['errors'].shape}; expected [M, 6, C, *S] and [M, K]")
        self.shape = tuple(frames.shape[2:])
        hdf5.require_held(frames)
        picked, *others = (hdf5.array(file[name]) for name in ("picked", "errors", "step", "trajectory", "on_policy"))
        usable = (picked >= 0).all(1)
        self._rows, self.skipped = usable.nonzero()[0], int((~usable).sum())
        self.picked = picked[usable]
        self.errors, self.step, self.trajectory, self.on_policy = (held[usable] for held in others)
        if CHECKSUM not in file.attrs:
            logger.info("%s was written by an older ttcfast without checksums: bits that flip in it go unnoticed", self.path)
        elif int(file.attrs[CHECKSUM]) != checksum(file):
            raise ValueError("its checksum does not match its contents")
        else:
            self._sums = hdf5.array(file["sums"])


class _Frames(FileIO):
    """A triplet file as bytes, whose frames begin at ``offset``."""

    def __init__(self, path: Path, offset: int) -> None:
        super().__init__(path)
        self.offset = offset


def frame_words(frames: np.ndarray) -> np.ndarray:
    """Views contiguous frames ``[m, n, C, *S]`` float32 as integers ``[m, n, words]`` of eight bytes, or of four if a frame has an odd
    number of values."""
    cells = math.prod(frames.shape[2:])
    return frames.reshape(*frames.shape[:2], cells).view(np.uint32 if cells % 2 else np.uint64)


def frame_sums(frames: np.ndarray) -> np.ndarray:
    """Returns sums of ``frame_words`` modulo 2^64, uint64 ``[m, n]``: any flipped bit changes one, at a tenth of the cost of a CRC."""
    sums: np.ndarray = frame_words(np.ascontiguousarray(frames, np.float32)).sum(2, dtype=np.uint64)
    return sums


def checksum(file: h5py.File) -> int:
    """Returns the CRC-32 of a file's attributes and data sets, with the sums in place of the frames."""
    attributes = [(name, str(file.attrs[name])) for name in ("format", "version", "surrogate", "spec", "config")]
    total = zlib.crc32(repr(attributes).encode())
    normalizer = (f"normalizer/{name}" for name in ("mean", "std", "delta_std"))
    arrays = ("errors", "picked", "step", "trajectory", "on_policy", "sums", *normalizer)
    for name in arrays:
        held = file[name][:]
        total = zlib.crc32(np.ascontiguousarray(held).tobytes(), zlib.crc32(f"{name}{held.dtype}{held.shape}".encode(), total))
    return total


def opened(path: Path) -> h5py.File:
    return hdf5.open_hdf5(path, "triplet file", "make it with `ttcfast build_prm_data out=...`, or give another path")


def _dumped(value: Any) -> str:
    return json.dumps(strict(value), sort_keys=True, allow_nan=False)
