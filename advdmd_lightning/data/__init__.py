"""Image–caption pairs: sources and the LightningDataModule.

A training batch is a dict with ``image`` (B, 3, H, W) float32 in [-1, 1] and ``caption``, a list of B strings.
"""

from advdmd_lightning.data.adv_grpo import AdvGRPO
from advdmd_lightning.data.datamodule import ImageCaptionDataModule
from advdmd_lightning.data.image_folder import ImageFolder
from advdmd_lightning.data.shapes import ShapesCaptions, ShapesStream
from advdmd_lightning.data.source import Source

__all__ = ["AdvGRPO", "ImageCaptionDataModule", "ImageFolder", "ShapesCaptions", "ShapesStream", "Source"]
