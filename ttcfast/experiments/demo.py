"""The logic of ``ttcfast demo``: the whole evaluation on the data and the checkpoint shipped in ``examples/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ttcfast.evaluation.baselines import BASELINES
from ttcfast.evaluation.reading import read_problems
from ttcfast.front_door import examples as examples_folder
from ttcfast.models import load_surrogate
from ttcfast.models.on_grid import require_fit
from ttcfast.report.recorded import write_recorded
from ttcfast.rewards.scorer import Scorer
from ttcfast.runtime.errors import DataError
from ttcfast.runtime.files import entries
from ttcfast.spec import StochasticConfig, TTCConfig

from .run_ttc import RunTTCConfig, RunTTCResult, finetuned_rows, run_ttc

HORIZONS = (1, 4, 16, 20)
RECORDED = "finetuned.json"
REWARD = "prm"  # folder of the shipped learned reward
DIRECTIONS = "directions.safetensors"  # fields along which the shipped surrogate errs


def run_demo(
    out: str | Path = "runs/demo",
    *,
    examples: str | Path | None = None,
    branching_factor: int = 3,
    steps: int = 20,
    sweep: Sequence[int] = (),
    problems: int = 8,
    sweep_problems: int = 2,
    beam_width: int = 4,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    prm: str | Path | None = None,
    stochastic: StochasticConfig | Mapping[str, object] | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    device: str = "cpu",
    tensorboard: bool = False,
    wandb: str | None = None,
    quiet: bool = False,
) -> RunTTCResult:
    """Roll out every method on the shipped test trajectories, print one table, and write metrics, table, figures and provenance.

    Args:
        out: folder for everything that is written.
        examples: folder with the ``.hdf5`` test trajectories, one ``.safetensors`` checkpoint, a learned reward in ``prm`` if there is one
            and, if it was recorded, ``finetuned.json``; None finds the one of this checkout or of the working directory.
        branching_factor: B of the table. steps: T. problems: trajectories of the table. seed: of the candidates.
        sweep: values of B for ARM, PRM and the oracle, on the first ``sweep_problems``; none by default, for the time it takes.
        beam_width: k, above 1 adds the row of a beam search by ARM that keeps k paths and draws k candidates for each (at least B), with
            projection alone: it takes more model evaluations than all candidates of another row; 1 leaves it out.
        checkpoint: another surrogate than the one in ``examples``.
        prm: another learned reward than the one in ``examples``, which is that of the shipped surrogate and is left out with another one.
        stochastic: replaces the default noise: with the surrogate in ``examples`` steps along the directions beside it, without their mean
            (which would be a correction of every candidate, not noise); the model's own dropout where there are none.
        scorers: rewards beside ARM, by name.
        device, tensorboard, wandb: as in ``RunTTCConfig``.
        quiet: print nothing.

    Raises:
        ArgumentError: no such folder of examples. DataError, CheckpointError, OutputError: as in ``run_ttc``.
    """
    folder = examples_folder(examples)
    if stochastic is None and checkpoint is None and (folder / DIRECTIONS).is_file():
        stochastic = StochasticConfig(dropout=False, directions=str(folder / DIRECTIONS), directions_strength=0.0)
    shipped = folder / REWARD if checkpoint is None and (folder / REWARD).is_dir() else None
    reward = None if (prm or shipped) is None else str(prm or shipped)
    searched = beam_width != 1
    search: dict[str, Any] = {"approach": "beam", "beam_width": beam_width} if searched else {}
    search["refine_lengths"] = (1.0,)  # a dense reward scores its own full step best; shorter ones cost evaluations and change no choice
    ttc = TTCConfig(branching_factor=branching_factor, seed=seed, use_prm=False, stochastic=stochastic, **search)
    config = RunTTCConfig(
        checkpoint=str(checkpoint or _checkpoint(folder)),
        data=(str(folder),),
        out=str(out),
        problems=problems,
        steps=steps,
        ttc=ttc,
        sweep=tuple(sweep),
        sweep_problems=sweep_problems,
        sweep_methods=("arm", *(["prm"] if reward is not None else []), "oracle"),
        prm=reward,
        methods=_rows(reward is not None, searched, scorers or {}),
        search_candidates=max(branching_factor, beam_width) if searched else None,
        search_projected=True,
        horizons=tuple(h for h in HORIZONS if h <= steps) or (steps,),
        shown=(0, problems // 2),
        recorded=None if checkpoint is not None else str(folder / RECORDED),  # it was recorded in units of the shipped one
        device=device,
        tensorboard=tensorboard,
        wandb=wandb,
    )
    structured = isinstance(ttc.stochastic, StochasticConfig) and ttc.stochastic.directions is not None
    noise = "along learned directions" if structured else "by the model's noise"
    title = f"{problems} test trajectories, {steps} steps, B = {branching_factor} candidates per step {noise}"
    result = run_ttc(config, scorers, title=title, quiet=quiet)
    if not quiet:
        _say_where(Path(out), result)
    return result


def record_finetuned(
    checkpoint: str | Path, about: Mapping[str, object], *, examples: str | Path | None = None, problems: int = 8, steps: int = 20
) -> Path:
    """Measure a surrogate that was trained further on the reward split, and record it as the demo's row: writes ``finetuned.json``.

    Args:
        checkpoint: the surrogate trained further; its deterministic rollout is measured, without and with projection.
        about: how it was made: ``"note"``, a sentence for readers of the table, and whatever else is worth keeping (commands, seconds).
        examples, problems, steps: as in ``run_demo``. Errors are in units of the shipped surrogate's training data.

    Raises:
        ArgumentError, DataError, CheckpointError, OutputError: as in ``run_demo``.
    """
    folder = examples_folder(examples)
    config = RunTTCConfig(checkpoint=str(_checkpoint(folder)), data=(str(folder),), problems=problems, steps=steps)
    given, data = read_problems(load_surrogate(config.checkpoint), config.data, steps, count=problems, checkpoint=config.checkpoint)
    require_fit(data, load_surrogate(checkpoint), str(checkpoint))
    rows = finetuned_rows(str(checkpoint), given, config)
    write_recorded(folder / RECORDED, rows, given, dict(about))
    return folder / RECORDED


def _rows(learned: bool, searched: bool, more: Mapping[str, Scorer]) -> tuple[str, ...]:
    """The table's rows: those of ``run_ttc``, and of the searches only ARM's, for the time they take."""
    search, learnt = ["arm_beam"] * searched, ["prm", "arm_prm", "prm_refined"] * learned  # figures show the fields of the last
    return (*BASELINES, "arm", *search, *more, *learnt, "oracle", "finetuned")


def _say_where(out: Path, result: RunTTCResult) -> None:
    print(f"\n{result.seconds:.0f} s in all. Numbers: {out / 'metrics.json'}, {out / 'summary.csv'}. Figures:")
    for path in result.figures:
        print(f"  {path}")
    print(f"All of it on one page: ttcfast report {out}")


def _checkpoint(folder: Path) -> Path:
    found = [p for p in entries(folder, ".safetensors") if "finetuned" not in p.name and p.name != DIRECTIONS]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise DataError(f"{folder} should hold one surrogate (*.safetensors), found {names}; give checkpoint=<file>")
    return found[0]
