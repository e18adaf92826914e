from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench import environment, rows
from bench.rows import COLUMNS, Row

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = {
    **dict.fromkeys(("group", "case", "shape", "dtype", "peer", "ours", "error", "device_name"), 'x, "y"'),
    "status": "ok",
    "device": "cpu",
    "threads": 2,
}


def test_rows_come_back_as_they_went(tmp_path):
    full = {"p50_us": 12.5, "loops": 40, "quick": True, "dirty": False, "commit": "abc", "bytes_moved": 2**40, "graph_note": "no graph"}
    written = [Row(**REQUIRED), Row(**REQUIRED, **full)]
    rows.write(tmp_path / "new" / "a-cpu.csv", written)
    assert rows.read(tmp_path / "new" / "a-cpu.csv") == written
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a-cpu.csv"]  # nothing half-written beside it


def test_what_was_not_measured_is_an_empty_cell(tmp_path):
    rows.write(tmp_path / "a.csv", [Row(**{**REQUIRED, "error": ""})])
    header, line = (text.split(",") for text in (tmp_path / "a.csv").read_text().replace('"x, ""y"""', "x").splitlines())
    cells = dict(zip(header, line))
    assert tuple(header) == COLUMNS
    assert {cells[c] for c in ("p50_us", "ratio", "gb_per_s", "share_of_read", "graph_p50_us", "rounds", "dirty")} == {""}


def test_a_file_of_other_columns_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("group,speed\narm,3\n")
    with pytest.raises(ValueError, match=r"a\.csv has other columns .*'speed'"):
        rows.read(tmp_path / "a.csv")


def test_provenance_says_machine_versions_and_commit():
    found = environment.columns("cpu")
    assert set(found) <= set(COLUMNS)
    assert found["device_name"] == found["cpu"] != ""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if head.returncode == 0:  # an unpacked archive has no commit to tell
        assert found["commit"] == head.stdout.strip() and isinstance(found["dirty"], bool)


def test_two_generations_of_one_model_name_are_told_apart():
    zen3, zen5 = ("cpu family\t: {}\nflags\t\t: fpu {}\n".format(*each) for each in ((25, "avx avx2"), (26, "avx2 avx512f")))
    assert environment.processor("AMD EPYC", zen3) == "AMD EPYC (family 25 with AVX2)"
    assert environment.processor("AMD EPYC", zen5) == "AMD EPYC (family 26 with AVX-512)"
    assert environment.processor("Cortex", "CPU part\t: 0xd0c\n") == "Cortex"


def test_the_readme_explains_every_column():
    text = (ROOT / "bench" / "results" / "README.md").read_text()
    assert [c for c in COLUMNS if f"`{c}`" not in text] == []
