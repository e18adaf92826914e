"""A training run that is killed in the middle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def kill_at_update(number: int, training: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``training`` and interrupt it in the place of its ``number``-th AdamW update; afterwards updates work as before."""
    original, calls = torch.optim.AdamW.step, []

    def killed(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            training()
