"""Operations with a reference, a CPU and a GPU implementation that agree; each is also ``torch.ops.ttcfast.<name>``.

All but ``accumulate_moments``, which says so, work under ``torch.func`` (``jvp``, ``jacfwd``, ``linearize``, ``grad``, ``vjp``, ``jacrev``,
``hessian``, ``vmap``, in any nesting), ``torch.autograd.forward_ad`` and ``create_graph=True``, eagerly and compiled: their definitions in
torch's own functions are then what is computed, at the speed of those. A derivative in what they hold constant is refused.

``torch.autocast`` never changes the dtype of a result but to widen it: each docstring names the precision that is computed in.
"""

from .accumulate_moments import accumulate_moments
from .add_noise import add_noise
from .arm import ArmScores, arm, arm_weights
from .arm_fields import FieldScores
from .heun import heun_correct, heun_predict
from .info import Info, info
from .keyed_dropout import keyed_dropout
from .mlp_flow import VelocityMLP, mlp_flow
from .norm_mish import norm_mish
from .normal import normal
from .registry import BackendError
from .topk import topk

__all__ = [
    "ArmScores",
    "BackendError",
    "FieldScores",
    "Info",
    "VelocityMLP",
    "accumulate_moments",
    "add_noise",
    "arm",
    "arm_weights",
    "heun_correct",
    "heun_predict",
    "info",
    "keyed_dropout",
    "mlp_flow",
    "norm_mish",
    "normal",
    "topk",
]
