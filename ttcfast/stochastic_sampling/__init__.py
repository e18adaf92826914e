"""What makes the candidates of a step differ: dropout, latent noise, input noise. ``enable_mc_dropout`` logs rates and their number;
a rollout (``ttcfast.ttc``) logs rates, scales and seed, once, at INFO."""

from .distinct import DeterministicModelError, require_distinct
from .dropout_wrap import enable_mc_dropout, mc_dropout
from .input_perturb import perturb_state
from .latent_noise import inject_latent_noise, latent_noise

__all__ = [
    "enable_mc_dropout",
    "mc_dropout",
    "inject_latent_noise",
    "latent_noise",
    "perturb_state",
    "DeterministicModelError",
    "require_distinct",
]
