"""Models, normalisers and metadata of other packages, made into what a ``Surrogate`` takes; nothing foreign is imported until used.

``normalizer`` converts statistics, ``channels_last``, ``time_first``, ``hf``, ``scot`` and ``neuraloperator`` wrap models, ``diffusers``
makes a sampler, and ``well`` builds a surrogate from The Well's metadata.
"""

from .denoisers import diffusers
from .operators import neuraloperator
from .statistics import normalizer
from .the_well import well
from .wrappers import channels_last, hf, scot, time_first

__all__ = ["normalizer", "channels_last", "time_first", "hf", "well", "neuraloperator", "diffusers", "scot"]
