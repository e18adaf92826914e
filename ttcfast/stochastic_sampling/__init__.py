"""Sources of difference between the candidates of a step: dropout, latent noise, input noise, learned directions.

A ``Surrogate`` draws all of them by key: ``noise_sites`` lists the places and ``keyed_noise`` activates them. ``enable_mc_dropout``,
``inject_latent_noise`` and ``perturb_state`` are for direct use and draw from torch's global streams; the latter two also accept a ``key``.
"""

from .distinct import DeterministicModelError, require_distinct
from .dropout_wrap import enable_mc_dropout, mc_dropout
from .input_perturb import perturb_state
from .keyed import Draw, keyed_noise
from .latent_noise import inject_latent_noise, latent_noise
from .noise_site import NoiseSite
from .sites import Site, noise_sites

__all__ = [
    "enable_mc_dropout",
    "mc_dropout",
    "inject_latent_noise",
    "latent_noise",
    "perturb_state",
    "NoiseSite",
    "noise_sites",
    "keyed_noise",
    "Site",
    "Draw",
    "DeterministicModelError",
    "require_distinct",
]
