"""Trains policies that differ in their random seeds together, by one forward and backward pass for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from .algorithms.together import RandomStream, Together, can_stack
from .policy_config import TrainPolicyConfig
from .policy_result import PolicyResult
from .train_policy import PolicyRun

Note = Callable[[float, str | None], None]


def train_policies(configs: Sequence[TrainPolicyConfig], notes: Sequence[Note]) -> list[PolicyResult]:
    """Train runs that differ in ``seed`` and ``out`` alone, or return the results of those that are finished.

    Every run ends as by :func:`ttcfast.pwm.train_policy.train_policy`, on a CPU with the same bits, and leaves the same files. Offline,
    with networks that end in linear layers, the runs that are equally far make their updates together; others train one after the other.
    The modes online and dmo have no axis of seeds: each run has episodes of its own there, and simulators between its updates. All runs are
    in memory at once, and each has its own ``processes``.

    Args:
        configs: Settings of each run.
        notes: What receives the updates made by each run, and a note.

    Raises:
        As :func:`ttcfast.pwm.train_policy.train_policy`.
    """
    turns: list[_Turn] = []
    with ExitStack() as stack:
        for config, note in zip(configs, notes):
            turns.append(_Turn(PolicyRun(config, turns[0].run.material if turns else None), note))
            stack.callback(turns[-1].close)
        group: list[_Turn] = []
        together: Together | None = None
        while going := [turn for turn in turns if turn.result is None]:
            before, group = group, _group(going)
            if group != before:
                together = Together([t.run.agent for t in group], [t.stream for t in group]) if len(group) > 1 else None
            if together is None:
                group[0].step()
            else:
                for turn, values in zip(group, _updated([t.run for t in group], group[0].asked, together)):
                    turn.send(values)
    return [turn.result for turn in turns if turn.result is not None]


class _Turn:
    """A run among others: the update that it asks for, its random numbers and, at the end, its result."""

    def __init__(self, run: PolicyRun, note: Note) -> None:
        self.run, self.asked = run, 0
        self.result = run.read() if run.config.resume else None
        if self.result is not None:
            note(run.steps, None)
            return
        self._stages = run.stages(note)
        try:
            self.asked = next(self._stages)
        except StopIteration as end:
            self.result = end.value
        self.stream = RandomStream()

    def step(self) -> None:
        """Make the next update alone."""
        with self.stream.own():
            values = self.run.step(self.asked)
        self.send(values)

    def send(self, values: dict[str, float]) -> None:
        """Take over an update's outcome: log, evaluate and save as the run does."""
        with self.stream.own():
            try:
                self.asked = self._stages.send(values)
            except StopIteration as end:
                self.result = end.value

    def close(self) -> None:
        if self.result is None:
            self._stages.close()


def _group(turns: Sequence[_Turn]) -> list[_Turn]:
    """Return those that make the next update together: the ones furthest behind."""
    if turns[0].run.config.mode != "offline" or not can_stack(turns[0].run.agent):
        return [turns[0]]
    least = min(turn.asked for turn in turns)
    return [turn for turn in turns if turn.asked == least]


def _updated(runs: Sequence[PolicyRun], step: int, together: Together) -> list[dict[str, float]]:
    """Make update ``step`` of all runs and share its time out among them."""
    config, wall, cpu = runs[0].config, time.monotonic(), time.process_time()
    later = step - config.wm_steps
    if later < 0:
        for run in runs:
            run.set_wm_rate(step)
        batches = [run.windows(step, config.batch) for run in runs]
        obs, act, rew = (torch.stack([batch[i] for batch in batches], 1) for i in range(3))
        found = together.update_wm(obs, act, rew)
    else:
        obs = torch.stack([run.observations(later) for run in runs])
        updates = together.update_policy(obs, later, progress=later / config.steps)
        found = [run.told(update) for run, update in zip(runs, updates)]
    wall, cpu = (time.monotonic() - wall) / len(runs), (time.process_time() - cpu) / len(runs)
    for run in runs:
        for watch, spent in ((run.watch, wall), (run.cpu, cpu), *([(run.wm_watch, wall)] if later < 0 else [])):
            watch.restart_at(watch.seconds() + spent)
    return found
