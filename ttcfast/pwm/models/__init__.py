"""World models of latent encoder, dynamics (an MLP, a residual MLP or a flow) and two-hot reward."""

from .base import SIZES, BaseWorldModel
from .flow_world_model import FlowWorldModel
from .world_model import MLPWorldModel, ResidualWorldModel

__all__ = ["SIZES", "BaseWorldModel", "FlowWorldModel", "MLPWorldModel", "ResidualWorldModel"]
