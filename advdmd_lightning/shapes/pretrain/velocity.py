"""Stage ``transformer``: the teacher's velocity network, by flow matching on latents that are encoded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

from advdmd_lightning.shapes import components
from advdmd_lightning.shapes.pretrain.autoencoder import load_vae
from advdmd_lightning.shapes.pretrain.data import ShapesImages
from advdmd_lightning.shapes.pretrain.loop import Pretraining
from advdmd_lightning.shapes.pretrain.pipeline import build_pipeline
from advdmd_lightning.shapes.stream import draw_batch


class FlowMatchingPretraining(Pretraining):
    """The velocity network, by flow matching with caption dropout.

    Args:
        lr: AdamW's learning rate.
        muon_lr: Muon's learning rate.
        ema_decay: decay of the average that is exported.
        decay_share: share of the run over which the learning rate falls to zero.
        caption_dropout: share of captions replaced by the empty one, for classifier-free guidance.
        time_mean: mean of the logit-normal distribution of t.
        time_std: its standard deviation.
        compile: compile the network (needs a C++ compiler).
    """

    blocks = "transformer_blocks"

    def __init__(
        self,
        lr: float = 2e-3,
        muon_lr: float = 2e-3,
        ema_decay: float = 0.999,
        decay_share: float = 0.4,
        caption_dropout: float = 0.1,
        time_mean: float = 0.3,
        time_std: float = 1.2,
        compile: bool = False,
    ) -> None:
        super().__init__(components.build_transformer(), lr, muon_lr, ema_decay, decay_share, compile)
        self.caption_dropout, self.time_mean, self.time_std = caption_dropout, time_mean, time_std

    def loss(self, batch: dict[str, Any], noise_source: torch.Generator) -> Tensor:
        """Flow-matching loss of a batch of :class:`ShapesLatents`."""
        x0 = batch["latents"]
        source: Any = {"generator": noise_source, "device": x0.device}
        dropped = torch.rand(len(x0), **source) < self.caption_dropout
        embeds = torch.where(dropped[:, None, None], batch["empty_embeds"], batch["embeds"])
        pooled = torch.where(dropped[:, None], batch["empty_pooled"], batch["pooled"])
        t = torch.sigmoid(self.time_mean + self.time_std * torch.randn(len(x0), **source))
        noise = torch.randn(x0.shape, **source)
        velocity = self.network(
            hidden_states=torch.lerp(x0, noise, t[:, None, None, None]),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=1000 * t,
            return_dict=False,
        )[0]
        return F.mse_loss(velocity, noise - x0)


class ShapesLatents(ShapesImages):
    """Batches of latents and text embeddings from a pool that is encoded once.

    Args:
        vae: checkpoint of stage ``vae``.
        pool: number of images in the pool.
        batch_size: latents per batch.
        seed: seed of the pool and of the drawing from it.
    """

    def __init__(self, vae: str, pool: int = 98304, batch_size: int = 32, seed: int = 2) -> None:
        super().__init__(batch_size, seed)
        self.vae, self.pool = vae, pool

    @torch.no_grad()
    def prepare_data(self) -> None:
        """Encode the pool beside the checkpoint, unless that is done.

        Raises:
            ValueError: if there is no checkpoint of stage ``vae``.
        """
        if not Path(self.vae).exists():
            raise ValueError(f"data.vae is {self.vae}, but there is no such checkpoint: run --stage vae first.")
        self.store = Path(self.vae).with_name(f"latents-{self.pool}-{self.seed}.pt")
        if self.store.exists():
            return
        pipeline = build_pipeline(load_vae(self.vae), components.build_transformer())
        latents, texts = [], []
        for index in trange(self.pool // 128, desc="encoding the pool"):
            batch = draw_batch(128, self.seed, index)
            moments = pipeline.vae.encode(batch["image"]).latent_dist
            latents.append(torch.stack([moments.mean, moments.std], 1).half())
            texts += batch["caption"]
        names = sorted(set(texts))
        embeds, _, pooled, _ = pipeline.encode_prompt(
            ["", *names], None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
        text = torch.tensor([names.index(text) + 1 for text in texts])
        torch.save({"latents": torch.cat(latents), "text": text, "embeds": embeds, "pooled": pooled}, self.store)

    def setup(self, stage: str) -> None:
        """Read the pool and normalise the latents."""
        data = torch.load(Path(self.vae).with_name(f"latents-{self.pool}-{self.seed}.pt"))
        vae = load_vae(self.vae).config
        self.mean = (data["latents"][:, 0].float() - vae.shift_factor) * vae.scaling_factor
        self.std = data["latents"][:, 1].float() * vae.scaling_factor
        self.text, self.embeds, self.pooled = data["text"], data["embeds"], data["pooled"]

    def make(self, index: int) -> dict[str, Any]:
        """Return batch number ``index``."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        rows = torch.randint(len(self.text), (self.batch_size,), generator=generator)
        noise = torch.randn(self.mean[rows].shape, generator=generator)
        return {
            "latents": self.mean[rows] + self.std[rows] * noise,
            "embeds": self.embeds[self.text[rows]],
            "pooled": self.pooled[self.text[rows]],
            "empty_embeds": self.embeds[:1],
            "empty_pooled": self.pooled[:1],
        }
