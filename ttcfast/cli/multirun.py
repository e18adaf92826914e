"""``ttcfast <command> --multirun``: runs a command several times through Hydra's sweeper and launchers, each in its own folder.

The ``out`` of a run is ``<hydra.sweep.dir>/<hydra.sweep.subdir>``: by default the ``out`` that was given, and the swept values
(``branching_factor-3,scale-relative``). Hydra adds ``multirun.yaml`` to the former and ``.hydra/`` to the folder of every run.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ttcfast.runtime.errors import ArgumentError, UserError, memory_errors

from .configuration import CONFIGS, Values, overrides, quoted, refused, register, resolve, settle
from .failures import as_user_error

_ABLATION, _VARIANT = "ablation=", "variant"
_FILES = (".safetensors", ".hdf5", ".h5")  # an out of this kind names a file, which every run puts into its folder


def multirun(command: str, arguments: Sequence[str]) -> None:
    """Run a command once for every combination of swept values, by Hydra's sweeper and launcher.

    A sweep in Hydra's notation (``ttc.branching_factor=1,3,5``, ``seed=range(0,3)``) stands for its values. ``ablation=<name>`` takes the
    named runs of ``configs/ablation/<name>.yaml``, each a list of ``key=value`` that is stronger than the other arguments; several are
    separated by commas. Keys of Hydra (``hydra/launcher=joblib``, ``hydra.sweep.dir=...``) are handed on as they are.

    Raises:
        ArgumentError: Nothing to sweep, a command without ``out``, an unknown ablation, a value swept twice, or what ``settle`` or Hydra
            refuses.
        UserError: A run failed; the runs that had started with it are complete.
    """
    own = [argument for argument in arguments if argument.lstrip("+~").startswith(("hydra.", "hydra/"))]
    names = [name for argument in arguments if argument.startswith(_ABLATION) for name in argument[len(_ABLATION) :].split(",")]
    values = settle(command, [a for a in arguments if a not in own and not a.startswith(_ABLATION)], sweeps=True)
    variants = {f"{name}/{run}": settings for name in names for run, settings in _ablation(name).items()}
    swept = [key for key, value in values.items() if isinstance(value, list)]
    if not variants and not swept and not any("sweeper" in argument for argument in own):
        raise ArgumentError(f"--multirun has nothing to sweep; give key=a,b,c or ablation=<name> ({_ablations()})")
    _check(command, values, swept, variants)
    written = [f"hydra.job.name={command}", f"hydra.sweep.dir={quoted(_folder(command, values))}"]
    if not any("job_logging" in argument for argument in own):  # a run prints its result; what it logs goes into its folder
        written.append("++hydra.job_logging.handlers.console.level=WARNING")
    if variants or swept:  # with a sweeper's own search spaces, Hydra's number of the run is its folder
        keys = ",".join([_VARIANT, *swept] if len(names) > 1 else swept)
        written.append(f"hydra.sweep.subdir='${{ttcfast_run:${{hydra.overrides.task}},[{keys}]}}'")
    written += [f"+hydra.callbacks.ttcfast._target_={__name__}.SideBySide", *own, *overrides(command, values)]
    written += [f"+{_VARIANT}=choice({','.join(variants)})"] * bool(variants)
    try:
        with _root_logger_kept(), initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            application = GlobalHydra.instance().hydra
            assert application is not None
            application.multirun(register(command), _job, written)
    except (HydraException, OmegaConfBaseException) as error:
        launcher = re.search(r"hydra/launcher/(\w+)", str(error))
        if launcher is not None:
            told = (
                f"there is no launcher {launcher[1]!r}; pip install 'ttcfast[launchers]' brings joblib, submitit_local and submitit_slurm"
            )
            raise ArgumentError(told) from error
        raise refused(error, arguments) from error


class SideBySide(Callback):
    """Prints, after all runs, the command that shows them on one page."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        print(f"Side by side: ttcfast report {shlex.quote(str(config.hydra.sweep.dir))}")


def _job(config: DictConfig) -> None:
    """Execute one run, in this process or in one of the launcher."""
    settings = HydraConfig.get()
    if settings.runtime.cwd not in sys.path:  # where fm.factory is looked for, also by runs that change the folder
        sys.path.insert(0, settings.runtime.cwd)
    try:
        with memory_errors():
            if _VARIANT in config:
                OmegaConf.set_struct(config, False)
                name, _, run = config.pop(_VARIANT).partition("/")
                config = OmegaConf.merge(config, OmegaConf.from_dotlist(_ablation(name)[run]))  # type: ignore[assignment]
            values: Any = OmegaConf.to_container(config, resolve=True)
            folder, given = Path(settings.sweep.dir, settings.sweep.subdir), Path(values["out"])
            folder = Path(settings.runtime.output_dir) if settings.job.chdir else folder
            values["out"] = str(folder / given.name if given.suffix in _FILES else folder)
            importlib.import_module(f"ttcfast.cli.{settings.job.name}").run(values)
    except UserError:
        raise
    except Exception as error:
        raise as_user_error(error) from error  # here, since a traceback does not come back from another process


def _run_name(task: Sequence[str], swept: Sequence[str]) -> str:
    """Return the folder name of a run: its name in the ablation (prefixed by the ablation if there are several) and the swept values."""
    held = dict(setting.lstrip("+").split("=", 1) for setting in task)
    variant = held.get(_VARIANT, "")
    short = ",".join(_short(key, held[key]) for key in swept if key != _VARIANT)
    return "/".join(part for part in (variant if _VARIANT in swept else variant.rpartition("/")[2], short) if part)


OmegaConf.register_new_resolver("ttcfast_run", _run_name, replace=True)


def _short(key: str, value: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", f"{key.rpartition('.')[2]}-{value}").strip("_")


def _check(command: str, values: Values, swept: Sequence[str], variants: dict[str, list[str]]) -> None:
    if "out" in swept:
        raise ArgumentError("out is the folder of all runs, each of which has its own in it; sweep something else")
    for key in swept:
        found = [_short(key, value) for value in values[key]]
        if len(set(found)) < len(found):
            raise ArgumentError(f"--multirun makes two runs of one name ({', '.join(found)}); sweep every value once")
    for name, settings in variants.items():
        if both := settle(command, settings).keys() & set(swept):
            raise ArgumentError(f"ablation={name.partition('/')[0]} sets {', '.join(sorted(both))} itself; sweep something else")


def _folder(command: str, values: Values) -> str:
    """Return the folder that contains all runs."""
    config = resolve(command, {key: value for key, value in values.items() if isinstance(value, str)})
    if "out" not in config:
        raise ArgumentError(f"ttcfast {command} has no out, so that its runs would not have a folder each; run it without --multirun")
    out = Path(config["out"])
    return str(out.parent if out.suffix in _FILES else out)


def _ablation(name: str) -> dict[str, list[str]]:
    path = CONFIGS / "ablation" / f"{name}.yaml"
    if not path.is_file():
        raise ArgumentError(f"ablation is {name!r}; there are {_ablations()}")
    held = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {str(run): [str(setting) for setting in settings] for run, settings in held.items()}


def _ablations() -> str:
    return ", ".join(sorted(path.stem for path in (CONFIGS / "ablation").glob("*.yaml")))


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Restore the root logger, which Hydra configures anew for every run."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
