"""Video of an episode, as a GIF or an MP4."""

from __future__ import annotations

import importlib
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ttcfast.runtime.errors import ArgumentError, MissingPackageError
from ttcfast.runtime.files import atomic_path

from .base import Environment, PaddedEnv
from .dm_control import DMControlEnv
from .render import RenderError, check_size, rendered
from .rollouts import Policy, checked

# Frames per second at most: GIFs count hundredths of a second, and 4 of them are shown alike everywhere.
_RATE = 25.0


def record_video(
    env: Environment, policy: Policy, path: str | os.PathLike[str], *, seed: int = 0, size: tuple[int, int] = (320, 240)
) -> float:
    """Play an episode and write its video, in real time at up to 25 frames per second.

    dm_control tasks are rendered by EGL or OSMesa in a process of their own, see ``ttcfast.pwm.envs.render``; any other environment by its
    method ``render() -> [height, width, 3]`` of bytes, whose size is its own.

    Args:
        env: The environment.
        policy: As for ``rollouts``: ``policy(obs [1, O], step, episodes [1]) -> actions [1, A]``.
        path: The file, ``*.gif`` or ``*.mp4``.
        seed: Random seed of the episode.
        size: Width and height in pixels.

    Returns:
        The return of the episode.

    Raises:
        ArgumentError: Another kind of file or size, an environment that cannot be rendered, or actions that do not fit.
        RenderError: There is no renderer.
        MissingPackageError: The file is an MP4 and there is no ffmpeg.
        OutputError: The file cannot be written.
    """
    kind = Path(path).suffix.lower()
    if kind not in (".gif", ".mp4"):
        raise ArgumentError(f"path is {os.fspath(path)}; give a file *.gif or *.mp4")
    check_size(size)
    ffmpeg = _ffmpeg() if kind == ".mp4" else None
    shown = _shown(env)
    if isinstance(shown, DMControlEnv):
        states, total = _played(env, policy, seed, shown.state)
        seconds = shown.action_repeat * shown.control_timestep
        every = max(1, math.ceil(1 / seconds / _RATE - 1e-9))
        frames = rendered(shown.task, seed, np.stack(states)[::every], size)
    else:
        pictures, total = _played(env, policy, seed, lambda: _picture(shown))
        seconds, every, frames = 1 / _RATE, 1, np.stack(pictures)
    with atomic_path(path) as place:
        if ffmpeg is None:
            _write_gif(place, frames, seconds * every)
        else:
            _write_mp4(place, frames, seconds * every, ffmpeg)
    return total


def _shown(env: Environment) -> Any:
    """Return what renders: the environment itself or the one that is padded."""
    shown = env.env if isinstance(env, PaddedEnv) else env
    if not isinstance(shown, DMControlEnv) and not hasattr(shown, "render"):
        raise ArgumentError(f"{env.name} has no method render(), so there is nothing to show")
    return shown


def _played(env: Environment, policy: Policy, seed: int, look: Any) -> tuple[list[Any], float]:
    """Play an episode; return what ``look`` saw at the reset and after each step, and the sum of rewards."""
    observation, seen, total = env.reset(seed), [look()], 0.0
    for step in range(env.episode_length):
        with torch.no_grad():
            actions = policy(torch.from_numpy(observation)[None], step, torch.zeros(1, dtype=torch.int64))
        observation, reward, over = env.step(checked(actions, 1, env.action_dim, step)[0])
        seen.append(look())
        total += reward
        if over:
            break
    return seen, total


def _picture(env: Any) -> NDArray[np.uint8]:
    picture = np.asarray(env.render())
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise RenderError(f"render() of {env.name} gives {picture.dtype} of shape {picture.shape}; expected [height, width, 3] of bytes")
    return picture


def _write_gif(path: Path, frames: NDArray[np.uint8], seconds: float) -> None:
    images = [Image.fromarray(frame).quantize(128) for frame in frames]
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=max(10, 10 * round(100 * seconds)), loop=0)


def _ffmpeg() -> str:
    """Return the program that writes MP4: ffmpeg, or the one that the package imageio-ffmpeg brings."""
    if (found := shutil.which("ffmpeg")) is not None:
        return found
    try:
        return str(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        raise MissingPackageError(
            f"an MP4 needs the program ffmpeg, which is not there ({error}); install it or the package imageio-ffmpeg, or write a *.gif"
        ) from error


def _write_mp4(path: Path, frames: NDArray[np.uint8], seconds: float, ffmpeg: str) -> None:
    height, width = frames.shape[1:3]
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{1 / seconds:g}", "-i", "-"]
    even = "pad=ceil(iw/2)*2:ceil(ih/2)*2"  # H.264 halves the size of the colours
    command = [ffmpeg, "-y", "-loglevel", "error", *given, "-vf", even, "-pix_fmt", "yuv420p", "-f", "mp4", str(path)]
    run = subprocess.run(command, input=frames.tobytes(), capture_output=True)
    if run.returncode:
        said = run.stderr.decode(errors="replace").strip().splitlines() or [f"status {run.returncode}"]
        raise RenderError(f"{ffmpeg} could not write {path.name}: {said[-1]}")
