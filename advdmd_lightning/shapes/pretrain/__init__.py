"""How the embedded teacher and the embedded CLIP were made: three stages, each an ordinary Lightning fit."""

from advdmd_lightning.shapes.pretrain.autoencoder import AutoencoderPretraining, load_vae
from advdmd_lightning.shapes.pretrain.contrastive import ContrastivePretraining, ShapesPairs, export_clip
from advdmd_lightning.shapes.pretrain.data import ShapesImages
from advdmd_lightning.shapes.pretrain.loop import Pretraining
from advdmd_lightning.shapes.pretrain.pipeline import build_pipeline, export_pipeline
from advdmd_lightning.shapes.pretrain.velocity import FlowMatchingPretraining, ShapesLatents

__all__ = [
    "AutoencoderPretraining",
    "ContrastivePretraining",
    "FlowMatchingPretraining",
    "Pretraining",
    "ShapesImages",
    "ShapesLatents",
    "ShapesPairs",
    "build_pipeline",
    "export_clip",
    "export_pipeline",
    "load_vae",
]
