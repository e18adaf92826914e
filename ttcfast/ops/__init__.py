"""Operations with a reference, a CPU and a GPU implementation that agree; each is also ``torch.ops.ttcfast.<name>``.

All except ``accumulate_moments`` work under ``torch.func`` (``jvp``, ``jacfwd``, ``linearize``, ``grad``, ``vjp``, ``jacrev``, ``hessian``,
``vmap``, in any nesting), ``torch.autograd.forward_ad`` and ``create_graph=True``, eager and compiled. These evaluate the operation's
definition in torch's own functions, at their speed. Derivatives in arguments that an operation holds constant are refused.

``torch.autocast`` changes the dtype of a result only to widen it; each docstring names the precision of the computation.
"""

from .accumulate_moments import accumulate_moments
from .add_noise import add_noise
from .arm import ArmScores, arm, arm_weights, check_quantities
from .arm_fields import FieldScores
from .closed_loop import closed_loop
from .heun import heun_correct, heun_predict
from .info import Info, info
from .keyed_dropout import keyed_dropout
from .mlp import MLP, mlp
from .mlp_flow import VelocityMLP, mlp_flow
from .norm_mish import norm_mish
from .normal import normal
from .registry import BackendError
from .topk import topk

__all__ = [
    "ArmScores",
    "MLP",
    "BackendError",
    "FieldScores",
    "Info",
    "VelocityMLP",
    "accumulate_moments",
    "add_noise",
    "arm",
    "arm_weights",
    "check_quantities",
    "closed_loop",
    "heun_correct",
    "heun_predict",
    "info",
    "keyed_dropout",
    "mlp",
    "mlp_flow",
    "norm_mish",
    "normal",
    "topk",
]
