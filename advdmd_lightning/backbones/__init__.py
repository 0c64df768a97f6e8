"""Model families behind one contract, and the three roles that their networks play."""

from advdmd_lightning.backbones.adapters import Adapters
from advdmd_lightning.backbones.base import Backbone
from advdmd_lightning.backbones.qwen_image import QwenImageBackbone
from advdmd_lightning.backbones.roles import Copies, Role, Roles
from advdmd_lightning.backbones.sd3 import SD3Backbone

__all__ = ["Adapters", "Backbone", "Copies", "QwenImageBackbone", "Role", "Roles", "SD3Backbone"]
