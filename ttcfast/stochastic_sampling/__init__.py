"""What makes the candidates of a step differ: dropout, latent noise, input noise.

A ``Surrogate`` draws all of it by key: ``noise_sites`` lists the places, ``keyed_noise`` makes them act. ``enable_mc_dropout``,
``inject_latent_noise`` and ``perturb_state`` are for direct use and draw in sequence from torch's streams; the latter two take a ``key``
as well. ``enable_mc_dropout`` logs rates and their number; a rollout (``ttcfast.ttc``) logs rates, scales and seed, once, at INFO.
"""

from .distinct import DeterministicModelError, require_distinct
from .dropout_wrap import enable_mc_dropout, mc_dropout
from .input_perturb import perturb_state
from .keyed import Draw, keyed_noise
from .latent_noise import inject_latent_noise, latent_noise
from .sites import Site, noise_sites

__all__ = [
    "enable_mc_dropout",
    "mc_dropout",
    "inject_latent_noise",
    "latent_noise",
    "perturb_state",
    "noise_sites",
    "keyed_noise",
    "Site",
    "Draw",
    "DeterministicModelError",
    "require_distinct",
]
