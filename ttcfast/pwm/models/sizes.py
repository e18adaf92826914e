"""The sizes of world models that PWM and TD-MPC2 name, and a small one for the CPU."""

from __future__ import annotations

from typing import Any

# TD-MPC2's names; "48M" counts its whole agent, of which the world model is 19 million.
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"latent_dim": 64, "units": (128, 128), "encoder_units": (128,), "task_dim": 16},
    "5M": {"latent_dim": 512, "units": (512, 512), "encoder_units": (256,), "task_dim": 64},
    "19M": {"latent_dim": 512, "units": (1024, 1024), "encoder_units": (1024, 1024), "task_dim": 64},
    "48M": {"latent_dim": 768, "units": (1792, 1792), "encoder_units": (1792, 1792, 1792), "task_dim": 64},
    "317M": {"latent_dim": 1376, "units": (4096, 4096), "encoder_units": (4096, 4096, 4096, 4096), "task_dim": 96},
}
