"""Pages and figures are what the rows say; claims name what is there."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from PIL import Image

from bench import groups, plots, report, rows
from bench.claims import COMPARISONS, CPU, CUDA, README
from bench.rows import Row

ARM = next(claim for claim in CPU if claim.case == README[0])
BASE = Row(group="arm", case=ARM.case, shape="[1, 2]", dtype="float32", peer="ours", ours="ours", status="ok", error="", device="cpu",
           device_name="Abacus", threads=1, p50_us=10.0, ratio=1.0, date="2026-01-02T03:04:05+00:00", commit="0123456789")  # fmt: skip


def row(peer: str = "ours", ratio: float = 1.0, **more: object) -> Row:
    return dataclasses.replace(BASE, peer=peer, ratio=ratio, p50_us=10 * ratio, **more)


MEASURED = [
    row(share_of_read=0.5, share_of_copy=0.4),
    row(ARM.plain, 40.0),
    row("strong", 1.5),
    row(threads=2),
    row(ARM.plain, 40.0, threads=2),
    row("strong", 0.9, threads=2),
]


def test_the_committed_pages_and_figures_are_what_the_rows_say():
    assert report.stale(report.load()) == [], "run make bench"


def test_a_row_beside_its_strongest_peer():
    line = next(line for line in report.operations(MEASURED, "cpu").splitlines() if line.startswith(f"| {report._name(ARM)}"))
    assert line.split(" | ")[1:] == ["[1, 2]", "40x", "strong", "1.50x", "0.90x", "40% |"]
    assert "**Abacus**, one thread (2026-01-02, commit 0123456)" in report.operations(MEASURED, "cpu")
    failed = [row(status="gate failed"), row("strong", 1.5)]
    assert "| [1, 2] | gate failed |" in report.operations(failed, "cpu")


def test_what_was_not_measured_says_so():
    text = report.operations(MEASURED, "cpu")
    assert text.count(report.NOT_MEASURED) == len(CPU) - 1
    assert report.operations(MEASURED, "cuda").count("not measured: no GPU was at hand") == len(CUDA)
    gpu = [
        dataclasses.replace(each, case=CUDA[0].case, device="cuda", device_name="H1")
        for each in (row(), row("strong", 2.5, graph_ratio=1.25))
    ]
    text = report.operations([*MEASURED, *gpu], "cuda")
    assert "| strong | 2.5x | 1.25x | – |" in text and "no GPU" not in text and text.count(report.NOT_MEASURED) == len(CUDA) - 1
    assert "bench_peers_cuda.png" in text and {path.name for path in report.figures([*MEASURED, *gpu])} == {
        f"bench_{what}_{device}.png" for what in ("peers", "memory") for device in ("cpu", "cuda")
    }
    assert "Abacus" not in text and "H1" not in report.operations([*MEASURED, *gpu], "cpu")
    assert report.short(MEASURED).count("| not measured | not measured |") == 5 and len(README) == 6


def test_where_a_peer_is_faster_and_what_share_a_part_takes():
    assert report.slower(MEASURED).splitlines()[2:] == [f"| arm, {ARM.case} | Abacus | 2 | strong | 0.90x |"]
    step = next(each for each in COMPARISONS if each.share)
    parts = [row(step.slow, 1.0, group=step.group, case=step.case), row(step.fast, 0.006, group=step.group, case=step.case)]
    assert f"| {step.what} | 0.6% |" in report.comparisons(parts)


def test_quick_rows_are_left_out_and_the_newest_are_quoted(tmp_path):
    newer = dataclasses.replace(MEASURED[2], ratio=3.0, date="2026-02-01T00:00:00+00:00")
    rows.write(tmp_path / "a" / "arm-cpu.csv", [newer])
    rows.write(tmp_path / "arm-cpu.csv", [*MEASURED[:3], dataclasses.replace(newer, quick=True, peer="quick")])
    found = report.load(tmp_path)
    assert [(each.peer, each.ratio) for each in found if each.peer in ("strong", "quick")] == [("strong", 3.0)]


def test_all_rows_are_on_the_page_of_rows():
    peak = [row(case="memory", peak_mb=332.4), row("many", case="memory", peak_mb=335.0)]
    peak = [dataclasses.replace(each, p50_us=None, ratio=None) for each in peak]
    lines = report.everything([*MEASURED, *peak]).splitlines()
    assert f"| {ARM.case} | [1, 2] | float32 | 1 | 10 us | {ARM.plain}: 40x; strong: 1.50x |" in lines
    assert "| memory | [1, 2] | float32 | 1 | 332 MiB | many: 335 MiB |" in lines and "## arm, Abacus" in lines


def test_another_number_is_found_and_written_and_prose_is_left(tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "benchmarks.md"
    page.write_text("before\n<!-- bench: operations-cpu -->\nold\n<!-- end -->\nafter\n")
    figures = {tmp_path / "docs" / "images" / f"bench_{name}_cpu.png" for name in ("memory", "peers")}
    assert set(report.write(MEASURED, tmp_path)) == {page, *figures} and report.stale(MEASURED, tmp_path) == []
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| 40x |" in text and "old" not in text
    for path in figures:
        with Image.open(path) as image:
            assert image.convert("RGB").getpixel((2, image.height // 2)) == (255, 255, 255)
    other = [*MEASURED[:2], dataclasses.replace(MEASURED[2], ratio=1.2), *MEASURED[3:]]
    assert set(report.stale(other, tmp_path)) == {page, tmp_path / "docs" / "images" / "bench_peers_cpu.png"}
    shutil.rmtree(tmp_path / "docs" / "images")
    assert set(report.stale(MEASURED, tmp_path)) == figures
    page.write_text(text.replace("1.50x", "1.60x"))
    assert page in report.stale(MEASURED, tmp_path)


def test_a_block_that_names_no_table_or_does_not_end_is_refused():
    with pytest.raises(ValueError, match="speed is no table; there are operations-cpu"):
        report.rewritten("<!-- bench: speed -->\n<!-- end -->\n", MEASURED)
    with pytest.raises(ValueError, match=r"1 blocks begin .* and 0 end"):
        report.rewritten("<!-- bench: slower -->\n", MEASURED)


def test_sizes_are_read_from_the_cases_of_the_scaling_rows():
    many = [row(group="scaling", case=f"arm, B {b}") for b in (100, 1)] + [row("torch", 3.0, group="scaling", case="arm, B 1")]
    data = report.scaling(many)
    assert isinstance(data, plots.Curves)
    assert data.panels == ((report.AXES["B"], (("arm", (1.0, 100.0), (0.01, 0.01)), ("arm: torch", (1.0,), (0.03,)))),)
    assert report.scaling(MEASURED) is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_claims_name_cases_and_peers_of_their_groups(device):
    used = (CPU if device == "cpu" else CUDA) + (COMPARISONS if device == "cpu" else ())
    known = {
        (group, case.name): tuple(case.peers) for group in dict.fromkeys(c.group for c in used) for case in groups.cases(group, device)
    }
    for claim in used:
        assert (claim.group, claim.case) in known, claim
        named = {claim.plain} if hasattr(claim, "plain") else {claim.fast, claim.slow}
        assert named <= set(known[claim.group, claim.case]), claim
    assert set(README) <= {claim.case for claim in CPU}
