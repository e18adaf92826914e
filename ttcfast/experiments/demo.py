"""The logic of ``ttcfast demo``: the complete evaluation on the data and models shipped in ``examples/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ttcfast.checks import one_of
from ttcfast.evaluation.baselines import BASELINES
from ttcfast.evaluation.evaluate import Evaluation
from ttcfast.evaluation.reading import read_problems
from ttcfast.evaluation.results import MethodResult
from ttcfast.front_door import examples as examples_folder
from ttcfast.models import load_surrogate
from ttcfast.models.on_grid import require_fit
from ttcfast.report.recorded import write_recorded
from ttcfast.rewards.scorer import Scorer
from ttcfast.runtime.errors import DataError
from ttcfast.runtime.files import entries
from ttcfast.spec import StochasticConfig, TTCConfig

from .run_ttc import RunTTCConfig, RunTTCResult, finetuned_rows, run_ttc

HORIZONS = (1, 4, 8, 16, 20)
SYSTEMS = ("euler", "kolmogorov")
RECORDED = "finetuned.json"
REWARD = "prm"  # folder of the shipped learned reward
DIRECTIONS = "directions.safetensors"  # fields along which the shipped surrogate errs


def run_demo(
    out: str | Path = "runs/demo",
    *,
    system: str = "euler",
    examples: str | Path | None = None,
    branching_factor: int = 3,
    steps: int = 20,
    sweep: Sequence[int] = (),
    problems: int = 8,
    sweep_problems: int = 2,
    beam_width: int = 1,
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
    """Evaluate every method on the shipped test trajectories, print one table, and write metrics, table, figures and provenance.

    Args:
        out: Folder for all output.
        system: ``"euler"``, a compressible gas; or ``"kolmogorov"``, forced two-dimensional turbulence.
        examples: Folder with ``.hdf5`` test trajectories, one ``.safetensors`` checkpoint and, optionally, a learned reward in ``prm`` and
            recorded rows in ``finetuned.json``; None takes that of the checkout or of the working directory.
        branching_factor: B of the table.
        steps: T, steps to roll out.
        sweep: Values of B for ARM, PRM and the oracle; none by default.
        problems: Number of trajectories of the table.
        sweep_problems: Number of problems of the sweep.
        beam_width: k; above 1 adds a beam search by ARM with k beams and k candidates per beam (at least B), only with projection, since it
            takes more model evaluations than any other row.
        seed: Random seed of the candidates.
        checkpoint: Surrogate to use instead of the one in ``examples``.
        prm: Learned reward to use instead of the one in ``examples``, which belongs to the shipped surrogate.
        stochastic: Noise of the candidates. By default the shipped surrogate steps along the directions beside it, without their mean (a
            correction of every candidate rather than noise), and other surrogates use their dropout.
        scorers: Further rewards by name.
        device, tensorboard, wandb: As in ``RunTTCConfig``.
        quiet: Print nothing.

    Raises:
        ArgumentError: There is no folder of examples.
        DataError, CheckpointError, OutputError: As in ``run_ttc``.
    """
    one_of("system", system, SYSTEMS)
    folder = examples_folder(examples) / ("" if system == "euler" or examples is not None else system)
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
        horizons=tuple(h for h in HORIZONS if h <= steps and (h != 8 or system != "euler")) or (steps,),
        shown=(0, problems // 2),
        recorded=str(folder / RECORDED) if checkpoint is None and system == "euler" else None,  # in units of the shipped one
        device=device,
        tensorboard=tensorboard,
        wandb=wandb,
    )
    structured = isinstance(ttc.stochastic, StochasticConfig) and ttc.stochastic.directions is not None
    noise = "along learned directions" if structured else "by the model's noise"
    title = f"{problems} test trajectories, {steps} steps, B = {branching_factor} candidates per step {noise}"
    result = run_ttc(config, scorers, title=title, story=partial(_story, more=tuple(scorers or ())), quiet=quiet)
    if not quiet:
        _say_where(Path(out), result)
    return result


def record_finetuned(
    checkpoint: str | Path, about: Mapping[str, object], *, examples: str | Path | None = None, problems: int = 8, steps: int = 20
) -> Path:
    """Measure a surrogate fine-tuned on the reward split and record it in ``finetuned.json`` as a row of the demo.

    Args:
        checkpoint: The fine-tuned surrogate, whose deterministic rollout is measured without and with projection.
        about: Origin of the checkpoint: ``"note"``, a sentence for readers of the table, and other details such as commands and seconds.
        examples, problems, steps: As in ``run_demo``. Errors are in units of the shipped surrogate's training data.

    Raises:
        ArgumentError, DataError, CheckpointError, OutputError: As in ``run_demo``.
    """
    folder = examples_folder(examples)
    own = str(_checkpoint(folder))
    config = RunTTCConfig(checkpoint=own, data=(str(folder),), problems=problems, steps=steps)
    given, data = read_problems(load_surrogate(own), config.data, steps, count=problems, checkpoint=own)
    require_fit(data, load_surrogate(checkpoint), str(checkpoint))
    rows = finetuned_rows(str(checkpoint), given, config)
    write_recorded(folder / RECORDED, rows, given, dict(about))
    return folder / RECORDED


def _rows(learned: bool, searched: bool, more: Mapping[str, Scorer]) -> tuple[str, ...]:
    """Return the rows of the run: those of ``run_ttc`` but a few, with the beam search of ARM alone, to save time."""
    search, learnt = ["arm_beam"] * searched, ["prm", "prm_symmetry"] * learned  # figures show the fields of the last
    corrector = ["prm_corrector"] * learned
    return (
        *BASELINES,
        "symmetry_mean",
        "solver",
        *corrector,
        "arm",
        *search,
        "residual",
        *more,
        "surrogate_solver",
        *learnt,
        "oracle",
        "finetuned",
    )


def _story(evaluation: Evaluation, more: Sequence[str] = ()) -> list[MethodResult]:
    """Return the dozen rows that are printed: references raw, the deterministic rollout in both forms, what uses a reward projected."""
    raw = ("persistence", "surrogate_solver", "finetuned")
    told = ("symmetry_mean", "prm_corrector", "arm", "residual", "prm", "prm_symmetry", "oracle", *more)
    rows = []
    for r in evaluation.results:
        plain = not r.projected and (r.method in raw or r.method.startswith("solver ") or r.method == "deterministic")
        single = evaluation.find(r.method, projected=True) is None
        if plain or (r.method in (*told, "deterministic") and (r.projected or single)):
            rows.append(r)
    return rows


def _say_where(out: Path, result: RunTTCResult) -> None:
    print(f"\nAll {len(result.evaluation.results)} rows: {out / 'table.md'}")
    print(f"{result.seconds:.0f} s in all. Numbers: {out / 'metrics.json'}, {out / 'summary.csv'}. Figures:")
    for path in result.figures:
        print(f"  {path}")
    print(f"All of it on one page: ttcfast report {out}")


def _checkpoint(folder: Path) -> Path:
    found = [p for p in entries(folder, ".safetensors") if "finetuned" not in p.name and p.name != DIRECTIONS]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise DataError(f"{folder} should hold one surrogate (*.safetensors), found {names}; give checkpoint=<file>")
    return found[0]
