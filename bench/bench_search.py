"""A search step among very many candidates: its memory, and the cost of chunks and selection.

* ``memory``: the peak resident set of a separate process that makes one step, at two numbers of candidates. The input-noise surrogate is
  one 3x3 convolution, so only the search itself could grow; the shipped one is the ViT of ``examples/``.
* ``chunks``: a step in chunks of 1024 candidates against the same step in one pass.
* ``selection``: that step against its selection alone (keys, top k, copies into and out of the slots) on precomputed candidates.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.core.base_fm import Surrogate
from ttcfast.models import load_surrogate
from ttcfast.rewards.arm import ARMScorer
from ttcfast.spec import ARMWeights, StateSpec, TTCConfig
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.memory import peak_bytes
from ttcfast.ttc.paths import Beams
from ttcfast.ttc.select.beams import BestOfBeams
from ttcfast.ttc.select.keep import Chunk, Group

from . import environment
from .rows import OK, PEER_FAILED, Row
from .targets import Target
from .timing import Case

ROOT = Path(__file__).resolve().parent.parent
K, CHUNK = 8, 1024
MEMORY = {"memory, input noise": ("noise", 1000, 1_000_000), "memory, shipped surrogate": ("shipped", 1000, 10_000)}
CHUNKED, WHOLE, SELECTION = "chunks of 1024", "one pass", "selection"


@dataclass(frozen=True)
class MemoryTarget(Target):
    """Return the peak at the most candidates over the peak at the fewest."""

    def measured(self, rows: Sequence[Row]) -> Iterator[tuple[Row, float]]:
        peaks: dict[tuple[str, str, int], list[tuple[Row, float]]] = {}
        for row in rows:
            if row.status == OK and row.device == self.device and fnmatchcase(row.case, self.case) and row.peak_mb is not None:
                peaks.setdefault((row.case, row.device, row.threads), []).append((row, row.peak_mb))
        for found in peaks.values():
            if len(found) > 1:
                yield found[-1][0], found[-1][1] / found[0][1]


TARGETS = (
    MemoryTarget("memory*", "", "peak_mb", most=1.05),
    Target("chunks*", WHOLE, "ratio", least=0.97),
    Target("selection*", SELECTION, "ratio", most=0.02),
)


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    for name, (kind, fewest, _) in MEMORY.items():
        few = Search(4 if tiny else fewest, kind, 4 if tiny else CHUNK, device)
        yield _case(name, few, {f"B {fewest}": few.step}, few.check_step)
    b = 9 if tiny else 4 * CHUNK + 1
    search = Search(b, "noise", 4 if tiny else CHUNK, device)
    yield _case(f"chunks B{b}", search, {CHUNKED: search.step, WHOLE: search.step_whole}, search.check_whole)
    search = Search(b, "noise", 4 if tiny else CHUNK, device)
    yield _case(f"selection B{b}", search, {CHUNKED: search.step, SELECTION: search.select}, search.check_selection)


def further(device: str, pattern: str) -> Iterator[Row]:
    """Yield rows without timings: the peak memory of a separate process for each case and number of candidates."""
    for name, (kind, *sizes) in MEMORY.items():
        if device != "cpu" or not fnmatchcase(name, pattern):
            continue
        for b in sizes:
            base: dict[str, Any] = {"group": "search", "case": name, "shape": _shape(b, kind), "dtype": "float32", "ours": f"B {sizes[0]}"}
            base |= {"peer": f"B {b}", "threads": 1, **environment.columns(device)}
            command = [sys.executable, "-m", "bench.bench_search", kind, str(b)]
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
            if run.returncode:
                yield Row(**base, status=PEER_FAILED, error=run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "killed")
                continue
            peak, seconds, copies = map(float, run.stdout.split())
            note = f"one step from a start: {seconds:.3g} s, {copies:.0f} state copies"
            yield Row(**base, status=OK, error="", peak_mb=peak / 2**20, note=note)


class Blur(nn.Module):
    """The smallest surrogate that mixes cells: one periodic 3x3 convolution, close to the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False)
        with torch.no_grad():
            self.mix.weight.mul_(0.01)
            for channel in range(4):
                self.mix.weight[channel, channel, 1, 1] += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


class Search:
    """A step among ``b`` candidates."""

    def __init__(self, b: int, kind: str, chunk: int, device: str) -> None:
        self.b, self.kind, self.chunk, self.device = b, kind, chunk, device

    @cached_property
    def fm(self) -> Surrogate:
        torch.manual_seed(0)
        if self.kind == "shipped":
            return load_surrogate(ROOT / "examples" / "surrogate.safetensors").to(self.device)
        noise = {"dropout": False, "input_eps": 0.01}
        return Surrogate(Blur(), StateSpec.euler2d(), stochastic=noise).to(self.device)

    @cached_property
    def x(self) -> Tensor:
        cells = (64, 64) if self.kind == "shipped" else (32, 32)
        lowest = torch.tensor([1.0, 0.0, 0.0, 2.5]).reshape(4, 1, 1)
        return (lowest + 0.1 * torch.rand(1, 4, *cells, generator=torch.Generator().manual_seed(1))).to(self.device)

    def controller(self, chunk: int | None) -> TTCBeam:
        scorer = ARMScorer(ARMWeights(), None, spec=self.fm.spec, scale="relative", momentum="components")
        cfg = TTCConfig(branching_factor=self.b, beam_width=min(K, self.b), approach="beam", chunk_size=chunk)
        return TTCBeam(self.fm, scorer, cfg)

    def step(self) -> Any:
        return self._chunked.step_from(self.x, step=1)

    def step_whole(self) -> Any:
        return self._whole.step_from(self.x, step=1)

    @cached_property
    def _chunked(self) -> TTCBeam:
        return self.controller(self.chunk)

    @cached_property
    def _whole(self) -> TTCBeam:
        return self.controller(None)

    @cached_property
    def _drawn(self) -> tuple[Beams, list[tuple[slice, int, Tensor, Tensor]]]:
        """Return the candidates of a step, chunk by chunk, with their scores."""
        controller, ids = self._chunked, torch.zeros(1, dtype=torch.int64, device=self.device)
        beams = Beams(self.x, ids, ids.clone(), ids.clone(), torch.zeros(1, dtype=torch.float64, device=self.device))
        chunks, _ = controller._chunks(self.x, ids)
        with torch.no_grad():
            parts = [(rows, start, c) for rows, start, c in chunks.of_step(beams, 1, 0)]
            return beams, [(rows, start, c, controller.scorer.score_group(self.x, c, None).double()) for rows, start, c in parts]

    def select(self) -> Any:
        beams, parts = self._drawn
        keep = BestOfBeams(Group(beams, self.b, torch.full_like(beams.offset, -torch.inf), None), min(K, self.b))
        for rows, start, candidates, scores in parts:
            keep.add(rows, start, Chunk(candidates, scores, scores))
        return keep.survivors(1e-6, beams.problem[:0])[0]

    def check_step(self) -> None:
        out = self.step()
        if not bool(out.state.isfinite().all()) or out.nfe != self.b:
            raise AssertionError("the step failed")

    def check_whole(self) -> None:
        ours, theirs = self.step(), self.step_whole()
        if not torch.equal(ours.positions, theirs.positions):
            raise AssertionError("a step in chunks selects other candidates than one in one pass")
        torch.testing.assert_close(ours.state, theirs.state)

    def check_selection(self) -> None:
        whole, alone = self.step(), self.select()
        if not torch.equal(whole.positions[0], alone.position):
            raise AssertionError("the selection differs from the step's")


def _case(name: str, search: Search, peers: dict[str, Any], check: Any) -> Case:
    return Case("search", name, _shape(search.b, search.kind), "float32", peers, ours=next(iter(peers)), check=check, device=search.device)


def _shape(b: int, kind: str) -> str:
    cells = 64 if kind == "shipped" else 32
    return f"[1, {b}, 4, {cells}, {cells}]"


def _one_step(kind: str, b: int) -> None:
    """Make one step in this process and print the peak in bytes, the seconds and the number of state copies."""
    search = Search(b, kind, CHUNK, "cpu")
    result = search.controller(CHUNK).rollout(search.x, 1, return_info=True)
    print(peak_bytes(torch.device("cpu")), result.seconds, result.copies)


if __name__ == "__main__":
    _one_step(sys.argv[1], int(sys.argv[2]))
