"""The tree of states: what has no descendants is dropped, at one question to the device per step."""

from __future__ import annotations

import torch
from torch import Tensor

from ttcfast.ttc.history import History, Layer


def prune_all(layers: list[Layer]) -> None:
    """The definition: every layer is looked at anew."""
    needed = torch.arange(len(layers[-1].parent))
    for later, layer in zip(reversed(layers), reversed(layers[:-1])):
        needed = later.parent[needed].unique()
        if 2 * len(needed) <= len(layer.states):
            layer.states = layer.states[layer.stored[needed]]
            layer.stored = torch.full_like(layer.stored, -1)
            layer.stored[needed] = torch.arange(len(needed))


def survivors(generator: torch.Generator, rows: int, kind: str) -> Tensor:
    """Parents of a step: any, all of them, or a few that take over."""
    if kind == "all":
        return torch.arange(rows)
    few = rows if kind == "any" else 2
    return torch.randint(0, few, (int(torch.randint(1, 9, (1,), generator=generator)),), generator=generator).sort().values


def test_the_same_is_kept_as_if_every_layer_were_looked_at():
    generator = torch.Generator().manual_seed(5)
    for kinds in (["any"], ["all"], ["any", "all", "few"], ["few", "all", "all"]):
        history, reference, rows = History(), [], 2
        for step in range(40):
            parent = survivors(generator, rows, kinds[step % len(kinds)]).clamp(max=rows - 1)
            states = torch.rand(len(parent), 3, generator=generator)
            history.add(states, parent)
            reference.append(Layer(states, torch.arange(len(parent)), parent, {}))
            history.prune()
            prune_all(reference)
            rows = len(parent)
            assert history.held == sum(len(layer.states) for layer in reference)
        for mine, expected in zip(history.layers, reference):
            assert torch.equal(mine.states, expected.states) and torch.equal(mine.stored, expected.stored)


def test_a_history_read_from_a_file_goes_on():
    generator = torch.Generator().manual_seed(6)
    whole, parents = History(), [survivors(generator, 2, "few") for _ in range(30)]
    states = [torch.rand(len(p), 3, generator=generator) for p in parents]
    parents = [p.clamp(max=len(before) - 1) for before, p in zip([torch.zeros(2), *parents], parents)]
    for k in range(30):
        whole.add(states[k], parents[k])
        whole.prune()
        if k == 17:
            halted = History()
            halted.layers = [Layer(**vars(layer)) for layer in whole.layers]
    for k in range(18, 30):
        halted.add(states[k], parents[k])
        halted.prune()
    assert all(torch.equal(a.states, b.states) and torch.equal(a.stored, b.stored) for a, b in zip(whole.layers, halted.layers))


def test_a_step_asks_the_device_once(monkeypatch):
    """A question is what brings data to the host; what is worked out there asks nothing, however long the rollout has become."""
    asked = []
    to_host = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: asked.append(self.shape) or to_host(self))
    looked_at = []
    unique = torch.unique
    monkeypatch.setattr(torch, "unique", lambda rows: looked_at.append(rows.shape) or unique(rows))
    history, generator = History(), torch.Generator().manual_seed(7)
    for _ in range(200):
        history.add(torch.zeros(4, 1), torch.randint(0, 4, (4,), generator=generator))
        history.prune()
    assert len(asked) == 200
    assert 200 <= len(looked_at) < 200 * 20 < 200 * 199 / 2
