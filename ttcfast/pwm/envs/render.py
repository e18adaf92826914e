"""Pictures of states of a dm_control task, rendered by MuJoCo in a fresh process.

dm_control chooses its renderer when it is first imported, and ``DMControlEnv`` imports it without one, so that no display is needed. So
another process renders: ``MUJOCO_GL=egl python -m ttcfast.pwm.envs.render TASK SEED WIDTH HEIGHT`` reads states as float64 from its
standard input and writes frames ``[height, width, 3]`` of bytes to its standard output.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ttcfast.runtime.errors import ArgumentError, UserError

from .dm_control import DMControlEnv

MOST = 1024
"""Largest width and height, dm_control's own."""
_RENDERERS = ("egl", "osmesa")


class RenderError(UserError):
    """There is no renderer, or it failed."""


def rendered(task: str, seed: int, states: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return pictures of a task by its first camera.

    Args:
        task: A name in ``TASKS``.
        seed: Seed of the episode, which places the targets.
        states: Simulator states ``[n, nq + nv]``.
        size: Width and height in pixels.

    Returns:
        Frames ``[n, height, width, 3]``.

    Raises:
        ArgumentError: A size is below 1 or above 1024.
        RenderError: Neither EGL nor OSMesa works; or the one that the environment variable ``MUJOCO_GL`` names does not.
    """
    check_size(size)
    given = os.environ.get("MUJOCO_GL", "disabled").lower()
    tried = []
    for renderer in _RENDERERS if given in ("disabled", "") else (given,):
        command = [sys.executable, "-m", __name__, task, str(seed), *map(str, size)]
        environment = {**os.environ, "MUJOCO_GL": renderer, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=environment, input=np.ascontiguousarray(states, np.float64).tobytes(), capture_output=True)
        if run.returncode == 0:
            return np.frombuffer(run.stdout, dtype=np.uint8).reshape(len(states), size[1], size[0], 3)
        said = run.stderr.decode(errors="replace").strip().splitlines() or [f"status {run.returncode}"]
        tried.append(f"{renderer}: {said[-1]}")
    raise RenderError(
        f"MuJoCo cannot render here ({'; '.join(tried)}); install EGL (libegl1 and a driver) or OSMesa (libosmesa6), "
        "or set MUJOCO_GL to a renderer that works"
    )


def check_size(size: Sequence[int]) -> None:
    """Raise ``ArgumentError`` unless ``size`` is a width and a height from 1 to 1024."""
    if len(size) != 2 or not all(isinstance(n, int) and 1 <= n <= MOST for n in size):
        raise ArgumentError(f"size is {tuple(size)}; give width and height in pixels, at most {MOST} each")


def _main(task: str, seed: str, width: str, height: str) -> None:
    frames = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints does not end up among the frames
    env = DMControlEnv(task)
    env.reset(int(seed))
    with frames:
        for state in np.frombuffer(sys.stdin.buffer.read(), np.float64).reshape(-1, len(env.state())):
            env.set_state(state)
            frames.write(env.physics.render(int(height), int(width), camera_id=0).tobytes())


if __name__ == "__main__":
    _main(*sys.argv[1:])
