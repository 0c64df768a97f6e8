"""How the embedded teacher was made: its autoencoder, then its velocity network, each an ordinary Lightning fit.

``make teacher`` runs ``python -m advdmd_lightning.shapes.pretrain``: the stages ``vae`` and ``transformer`` of
``configs/teacher/``, each resuming by itself, then the pipeline folder.
Muon steps the weight matrices of the blocks, AdamW the rest.
"""

from __future__ import annotations

import argparse
import copy
import math
from abc import ABC, abstractmethod
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from tqdm import trange

from advdmd_lightning.shapes import components
from advdmd_lightning.shapes.stream import draw_batch

STAGES = ("vae", "transformer")


class Pretraining(L.LightningModule, ABC):
    """Shared loop of the stages: one loss, Muon and AdamW, warmup–constant–decay schedule, EMA of the network.

    Args:
        network: the network to train.
        lr: AdamW's learning rate.
        muon_lr: Muon's learning rate, scaled per matrix to the size of AdamW's updates.
        ema_decay: decay of the average that is exported.
        decay_share: share of the run, at its end, over which the learning rate falls to zero.
        compile: compile the network (needs a C++ compiler).
    """

    def __init__(
        self, network: nn.Module, lr: float, muon_lr: float, ema_decay: float, decay_share: float, compile: bool
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lr, self.muon_lr, self.ema_decay, self.decay_share = lr, muon_lr, ema_decay, decay_share
        self.network = network
        self.averaged = copy.deepcopy(network).requires_grad_(False)
        if compile:
            network.compile()

    @abstractmethod
    def loss(self, batch: dict[str, Any], noise_source: torch.Generator) -> Tensor:
        """Return the stage's loss for one batch."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Take one step of both optimizers, counted once, then update the average."""
        loss = self.loss(batch, torch.Generator(self.device).manual_seed(self.global_step))  # the same after a resume
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        counted, *others = cast("list[LightningOptimizer]", self.optimizers())
        counted.step()
        counted.zero_grad()
        for other in others:  # past Lightning's wrapper, which would count these steps as global steps
            other.optimizer.step()
            other.optimizer.zero_grad()
        for schedule in cast("list[LambdaLR]", self.lr_schedulers()):
            schedule.step()
        decay = min(self.ema_decay, self.global_step / (10 + self.global_step))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.network.parameters()), 1 - decay)
        self.log("loss", loss, prog_bar=True)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[LambdaLR]]:
        """Muon for the matrices inside the transformer's blocks, AdamW for everything else."""
        named = dict(self.network.named_parameters())
        matrices = [n for n, w in named.items() if "transformer_blocks" in n and w.ndim == 2 and ".norm1" not in n]
        rest = [w for n, w in named.items() if n not in matrices]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=self.lr, betas=(0.9, 0.99), weight_decay=0.0),
            torch.optim.Muon(
                [named[n] for n in matrices] or [nn.Parameter(torch.zeros(1, 1))],
                lr=self.muon_lr,
                weight_decay=0.0,
                adjust_lr_fn="match_rms_adamw",
            ),
        ]
        total = self.trainer.max_steps

        def factor(step: int) -> float:
            return max(0.0, min(1.0, (step + 1) / 200, (total - step) / (self.decay_share * total)))

        return optimizers, [LambdaLR(optimizer, factor) for optimizer in optimizers]


def principal_components(images: Tensor, patch: int, count: int) -> Tensor:
    """Return the leading principal directions of the images' patches.

    Args:
        images: (B, 3, H, W).
        patch: side of a patch in pixels.
        count: number of directions.

    Returns:
        (count, 3, patch, patch) orthonormal directions, as a convolution kernel.
    """
    patches = F.unfold(images, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    _, directions = torch.linalg.eigh(patches.mT @ patches / len(patches))
    return directions.mT.flip(0)[:count].reshape(count, 3, patch, patch)


class AutoencoderPretraining(Pretraining):
    """Stage 1: the autoencoder.

    Squared error, and a KL divergence to a prior around the principal components of 4×4 patches. So latents keep the
    spectrum of pixels, large shapes large and fine detail small, and the velocity network learns shapes first.

    Args:
        kl_weight: weight of the KL divergence (nats per latent value) against the squared error per pixel.
        prior_std: standard deviation of the prior around the principal components, in pixel units.
        lr: learning rate.
        ema_decay: decay of the average that is exported.
        decay_share: share of the run over which the learning rate falls to zero.
    """

    network: AutoencoderKL
    kernel: Tensor

    def __init__(
        self,
        kl_weight: float = 5e-5,
        prior_std: float = 0.03,
        lr: float = 2e-3,
        ema_decay: float = 0.995,
        decay_share: float = 0.6,
    ) -> None:
        super().__init__(components.build_vae(), lr, lr, ema_decay, decay_share, compile=False)
        self.kl_weight, self.prior_std = kl_weight, prior_std
        kernel = principal_components(draw_batch(2048, seed=0, index=0)["image"], 4, components.LATENT_CHANNELS)
        self.register_buffer("kernel", kernel)

    def loss(self, batch: dict[str, Any], noise_source: torch.Generator) -> Tensor:
        """Squared error plus weighted KL of a batch with key ``image``."""
        image = batch["image"]
        posterior = self.network.encode(image).latent_dist
        error = F.mse_loss(self.network.decode(posterior.sample(noise_source)).sample, image)
        shift = (posterior.mean - F.conv2d(image, self.kernel, stride=4)) / self.prior_std
        log_ratio = posterior.logvar - 2 * math.log(self.prior_std)
        kl = 0.5 * (shift.square() + log_ratio.exp() - log_ratio - 1).mean()
        self.log_dict({"squared_error": error, "kl": kl}, prog_bar=True)
        return error + self.kl_weight * kl


class FlowMatchingPretraining(Pretraining):
    """Stage 2: the velocity network, by flow matching on the latents of stage 1 with caption dropout.

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


class _Stream(IterableDataset):
    """Numbered batches, made by a function of the number."""

    def __init__(self, make: Any, start: int) -> None:
        self.make, self.index = make, start

    def __iter__(self) -> Any:
        while True:
            yield self.make(self.index)
            self.index += 1


class ShapesImages(L.LightningDataModule):
    """Batches of freshly rendered images; after a resume the stream goes on where it stopped.

    Args:
        batch_size: images per batch.
        seed: seed of the stream.
    """

    def __init__(self, batch_size: int = 32, seed: int = 1) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed

    def make(self, index: int) -> dict[str, Any]:
        """Return batch number ``index``."""
        return draw_batch(self.batch_size, self.seed, index)

    def train_dataloader(self) -> DataLoader:
        """Return the stream from the trainer's step on."""
        assert self.trainer is not None
        return DataLoader(_Stream(self.make, self.trainer.global_step), batch_size=None)


class ShapesLatents(ShapesImages):
    """Batches of latents and text embeddings from a pool that is encoded once.

    Args:
        vae: checkpoint of stage 1.
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
            ValueError: if there is no checkpoint of stage 1.
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


def load_vae(checkpoint: str | Path) -> AutoencoderKL:
    """Build the autoencoder of a stage-1 checkpoint, with the shift and scale that make its latents standard."""
    vae = components.build_vae().eval().requires_grad_(False)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    vae.load_state_dict({k.removeprefix("averaged."): v for k, v in state.items() if k.startswith("averaged.")})
    with torch.no_grad():
        latents = vae.encode(draw_batch(512, seed=0, index=0)["image"]).latent_dist.mean
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 4), scaling_factor=round(1 / float(latents.std()), 4)
    )
    return vae


def build_pipeline(vae: AutoencoderKL, transformer: nn.Module) -> StableDiffusion3Pipeline:
    """Put the parts together as a stock pipeline without T5."""
    tokenizer = components.build_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=components.build_scheduler(),
        vae=vae,
        text_encoder=components.build_text_encoder(tokenizer, seed=1, mixing=1.0),
        tokenizer=tokenizer,
        text_encoder_2=components.build_text_encoder(tokenizer, seed=2, mixing=0.2),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def export(vae: str | Path, transformer: str | Path, out: str | Path) -> None:
    """Write the pipeline folder from the checkpoints of the two stages, with averaged weights.

    Args:
        vae: checkpoint of stage 1.
        transformer: checkpoint of stage 2.
        out: folder to write.
    """
    network = components.build_transformer().eval()
    state = torch.load(transformer, weights_only=True)["state_dict"]
    network.load_state_dict({k.removeprefix("averaged."): v for k, v in state.items() if k.startswith("averaged.")})
    build_pipeline(load_vae(vae), network).save_pretrained(out)


def fit(stage: str, root: str | Path, *overrides: str) -> Path:
    """Run one stage from its packaged recipe, from its last checkpoint if there is one.

    Args:
        stage: one of :data:`STAGES`.
        root: folder of all stages; this one works in ``root/stage``.
        overrides: further words of the command line, such as ``--trainer.max_steps=100``.

    Returns:
        The stage's last checkpoint.
    """
    folder = Path(root, stage)
    checkpoint = folder / "last.ckpt"
    places = [
        f"--trainer.default_root_dir={folder}",
        f"--trainer.callbacks.init_args.dirpath={folder}",
        f"--trainer.logger.init_args.save_dir={folder}",
    ]
    if stage == "transformer":
        places.append(f"--data.init_args.vae={Path(root, 'vae', 'last.ckpt')}")
    with as_file(files("advdmd_lightning.configs") / "teacher" / f"{stage}.yaml") as config:
        words = ["--config", str(config), *places, *overrides]
        cli = LightningCLI(args=words, run=False, save_config_callback=None)
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint if checkpoint.exists() else None)
    return checkpoint


def main() -> None:
    """Make the teacher: both stages, each from its last checkpoint if there is one, then the pipeline folder."""
    parser = argparse.ArgumentParser(prog="python -m advdmd_lightning.shapes.pretrain", description=main.__doc__)
    parser.add_argument("--root", type=Path, default="runs/teacher", help="folder of checkpoints, logs, pipeline")
    parser.add_argument("--stage", choices=(*STAGES, "export"), help="run this stage alone")
    parser.add_argument("--compile", action="store_true", help="compile the transformer; needs a C++ compiler")
    arguments, overrides = parser.parse_known_args()
    for stage in STAGES:
        if arguments.stage in (None, stage):
            compiled = ["--model.init_args.compile=true"] if arguments.compile and stage == "transformer" else []
            fit(stage, arguments.root, *compiled, *overrides)
    if arguments.stage in (None, "export"):
        vae, transformer = (arguments.root / stage / "last.ckpt" for stage in STAGES)
        export(vae, transformer, arguments.root / "pipeline")


if __name__ == "__main__":
    main()
