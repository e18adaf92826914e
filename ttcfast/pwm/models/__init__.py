"""World models: latent encoder, dynamics and two-hot reward; the dynamics as an MLP, a residual MLP, or a flow."""

from .base import BaseWorldModel
from .flow_world_model import FlowWorldModel
from .sizes import SIZES
from .world_model import MLPWorldModel, ResidualWorldModel

__all__ = ["SIZES", "BaseWorldModel", "FlowWorldModel", "MLPWorldModel", "ResidualWorldModel"]
