"""Videos show the episode that is played, in real time; without a renderer or a writer there is one clear line."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pwm.envs.points import Point
from tests.simulators import needs_dm_control
from ttcfast.pwm.envs import DMControlEnv, GymnasiumEnv, PaddedEnv, video
from ttcfast.pwm.envs.render import RenderError, rendered
from ttcfast.pwm.envs.video import record_video
from ttcfast.runtime.errors import ArgumentError, MissingPackageError, OutputError


def push(obs: torch.Tensor, step: int, episodes: torch.Tensor) -> torch.Tensor:
    return torch.full((1, 1), 0.5)


def still(obs: torch.Tensor, step: int, episodes: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1, 1)


class Drawn(Point):
    """A point that is drawn as a bright column at its step."""

    def render(self) -> np.ndarray:
        picture = np.zeros((8, 12, 3), np.uint8)
        picture[:, 2 * self._t] = 255
        return picture


def frames(path: Path) -> tuple[list[np.ndarray], list[int]]:
    with Image.open(path) as image:
        held, durations = [], []
        for i in range(image.n_frames):
            image.seek(i)
            held.append(np.array(image.convert("RGB")))
            durations.append(image.info["duration"])
    return held, durations


@pytest.fixture(scope="module")
def renderer() -> None:
    try:
        rendered("cartpole-swingup", 0, np.zeros((1, 4)), (16, 16))
    except RenderError as error:
        pytest.skip(f"MuJoCo cannot render here: {error}")


def test_each_step_is_a_picture_and_the_return_is_the_episodes(tmp_path):
    env = Drawn()
    total = record_video(env, push, tmp_path / "a.gif", seed=3)
    held, durations = frames(tmp_path / "a.gif")
    assert [int(np.argmax(frame[0, :, 0])) for frame in held] == [0, 2, 4, 6, 8, 10] and durations == [40] * 6
    env.reset(3)
    assert total == pytest.approx(sum(env.step(np.array([0.5]))[1] for _ in range(5)))


@needs_dm_control
def test_a_picture_shows_the_state(renderer):
    upright, right, hanging = np.zeros(4), np.array([1.5, 0, 0, 0]), np.array([0, np.pi, 0, 0])
    pictures = rendered("cartpole-swingup", 0, np.stack([upright, right, hanging, upright]), (64, 48)).astype(int)
    assert pictures.shape == (4, 48, 64, 3) and np.array_equal(pictures[0], pictures[3])
    moved, turned = (np.abs(pictures[0] - other).sum(2) > 60 for other in pictures[1:3])
    assert moved[:, 32:].any() and turned[:20, 28:36].any() and not turned[:, :16].any(), "the pole alone turned, in the middle"


@needs_dm_control
def test_a_dm_control_episode_is_a_gif_in_real_time(renderer, tmp_path):
    env = DMControlEnv("cartpole-swingup", action_repeat=50)
    total = record_video(PaddedEnv(env, 9, 1), push, tmp_path / "a.gif", seed=1, size=(48, 32))
    held, durations = frames(tmp_path / "a.gif")
    assert held[0].shape == (32, 48, 3) and sum(durations) == 21 * 500, "20 steps of half a second, and the first picture"
    assert len(held) > 5 and np.abs(held[0].astype(int) - held[4]).max() > 60
    env.reset(1)
    assert total == pytest.approx(sum(env.step(np.array([0.5]))[1] for _ in range(20)))


@needs_dm_control
def test_frames_beyond_25_per_second_are_left_out(tmp_path, monkeypatch):
    asked = []

    def nothing(task, seed, states, size):
        asked.append((seed, states))
        return np.zeros((len(states), 2, 2, 3), np.uint8)

    monkeypatch.setattr(video, "rendered", nothing)
    record_video(DMControlEnv("cartpole-swingup"), still, tmp_path / "a.gif", seed=4)
    (seed, states), env = asked[0], DMControlEnv("cartpole-swingup")
    assert seed == 4 and states.shape == (251, 4), "every second of 501 states, which are 20 ms apart"
    env.reset(4)
    assert np.array_equal(states[0], env.state()) and sum(frames(tmp_path / "a.gif")[1]) == 251 * 40


@needs_dm_control
def test_a_machine_without_a_renderer_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "abacus")
    with pytest.raises(RenderError, match=r"MuJoCo cannot render here \(abacus: .*abacus.*\); install EGL .* or OSMesa") as told:
        record_video(DMControlEnv("cartpole-swingup", action_repeat=500), still, tmp_path / "a.gif")
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


def test_an_mp4_goes_through_ffmpeg(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\nwc -c >> "$last"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    record_video(Drawn(), push, tmp_path / "a.mp4")
    told, size = (tmp_path / "a.mp4").read_text().splitlines()
    assert "-f rawvideo -pix_fmt rgb24 -s 12x8 -r 25 -i - " in told and int(size) == 6 * 8 * 12 * 3
    program.write_text("#!/bin/sh\ncat > /dev/null\necho Unknown encoder >&2\nexit 1\n")
    with pytest.raises(RenderError, match=r"ffmpeg could not write .*: Unknown encoder"):
        record_video(Drawn(), push, tmp_path / "b.mp4")
    assert not (tmp_path / "b.mp4").exists()


def test_a_machine_without_ffmpeg_is_told_before_anything_is_played(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingPackageError, match=r"an MP4 needs the program ffmpeg, .* or write a \*\.gif"):
        record_video(Drawn(), lambda *_: pytest.fail("played"), tmp_path / "a.mp4")


def test_an_environment_of_gymnasium_renders_itself(tmp_path):
    gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed; pip install 'ttcfast[gym]' brings it")

    class Lamp(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))
        render_mode = "rgb_array"
        t = 0

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.t += 1
            return np.zeros(1, np.float32), 1.0, False, False, {}

        def render(self):
            return np.full((4, 4, 3), 80 * self.t, np.uint8)

    assert record_video(GymnasiumEnv(Lamp(), episode_length=3), push, tmp_path / "a.gif") == 3
    assert [int(frame[0, 0, 0]) for frame in frames(tmp_path / "a.gif")[0]] == [0, 80, 160, 240]
    with pytest.raises(ArgumentError, match=r"has the render_mode None; give .*render_mode='rgb_array'"):
        record_video(GymnasiumEnv("Pendulum-v1"), push, tmp_path / "b.gif")


@pytest.mark.parametrize(
    ("env", "policy", "name", "options", "error", "message"),
    [
        (Point(), push, "a.gif", {}, ArgumentError, r"point has no method render\(\)"),
        (Drawn(), push, "a.avi", {}, ArgumentError, r"path is .*a\.avi; give a file \*\.gif or \*\.mp4"),
        (Drawn(), push, "a.gif", {"size": (2000, 10)}, ArgumentError, r"size is \(2000, 10\); .*at most 1024"),
        (Drawn(), push, "a.gif", {"size": (10.0, 10)}, ArgumentError, r"size is \(10.0, 10\)"),
        (Drawn(), lambda *_: torch.full((1, 1), 2.0), "a.gif", {}, ArgumentError, r"the policy's action is \[2.0\] at step 0"),
        (Drawn(), push, "none/../file/a.gif", {}, OutputError, "cannot write"),
    ],
)
def test_wrong_arguments_are_one_clear_error(tmp_path, env, policy, name, options, error, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=message):
        record_video(env, policy, tmp_path / name, **options)
