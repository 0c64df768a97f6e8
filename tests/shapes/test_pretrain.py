"""The two stages that made the teacher, for real but short, from their packaged recipes; and the shipped folder."""

from __future__ import annotations

import shutil
import sys
from importlib.resources import files
from itertools import islice
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from advdmd_lightning.backbones import SD3Backbone
from advdmd_lightning.backbones.pretrained import locate
from advdmd_lightning.evaluation.entrants import Entrant, evaluate
from advdmd_lightning.recipes import recipe_names
from advdmd_lightning.shapes import components, pretrain
from advdmd_lightning.shapes.checker import ShapesScore
from advdmd_lightning.shapes.grammar import evaluation_captions
from advdmd_lightning.shapes.stream import draw_batch

STEPS = 3


def fit(stage, root, *more, steps=STEPS):
    """Run a stage for few small steps with a checkpoint after each, and return the checkpoint's content."""
    short = [
        f"--trainer.max_steps={steps}",
        "--trainer.callbacks.init_args.every_n_train_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--data.init_args.batch_size=4",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain"])
        return load(pretrain.fit(stage, root, *short, *more))


def load(checkpoint):
    return torch.load(checkpoint, weights_only=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("teacher")


@pytest.fixture(scope="module")
def vae(root):
    """Checkpoint of stage 1."""
    fit("vae", root)
    return root / "vae" / "last.ckpt"


@pytest.fixture(scope="module")
def transformer(root, vae):
    """Checkpoint of stage 2."""
    fit("transformer", root, "--data.init_args.pool=256")
    return root / "transformer" / "last.ckpt"


@pytest.fixture(scope="module")
def folder(root, vae, transformer):
    """The exported pipeline."""
    pretrain.export(vae, transformer, root / "pipeline")
    return root / "pipeline"


def part(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def changed(before, after):
    """Share of the tensors that differ."""
    assert before.keys() == after.keys()
    return float(np.mean([not torch.equal(before[name], after[name]) for name in before]))


def test_stages_have_recipes():
    folder = files("advdmd_lightning.configs") / "teacher"
    assert {path.name for path in folder.iterdir()} == {f"{stage}.yaml" for stage in pretrain.STAGES}
    assert not set(pretrain.STAGES) & set(recipe_names())  # these are not recipes of the `advdmd` command


@pytest.mark.parametrize(("stage", "more"), [("vae", ()), ("transformer", ("--data.init_args.pool=256",))])
def test_a_resumed_stage_ends_bitwise_as_an_uninterrupted_one(tmp_path, root, vae, stage, more):
    """From a checkpoint of the middle: weights, average, schedule, noise and data."""
    if stage == "transformer":
        shutil.copytree(root / "vae", tmp_path / "vae")
    keep_all = "--trainer.callbacks.init_args.save_top_k=-1"
    whole = fit(stage, tmp_path, keep_all, *more, steps=STEPS)
    middle = next((tmp_path / stage).glob(f"*step={STEPS - 1}.ckpt"))
    middle.replace(tmp_path / stage / "last.ckpt")
    resumed = fit(stage, tmp_path, *more, steps=STEPS)
    assert resumed["global_step"] == whole["global_step"] == STEPS
    assert changed(whole["state_dict"], resumed["state_dict"]) == 0
    assert changed(part(whole["state_dict"], "network."), part(whole["state_dict"], "averaged.")) > 0.5


def test_transformer_stage_starts_from_zero_and_encodes_the_pool_once(root, vae, transformer):
    trained = part(load(transformer)["state_dict"], "network.")
    assert trained["proj_out.weight"].any()
    assert not components.build_transformer().state_dict()["proj_out.weight"].any()
    pool = vae.with_name("latents-256-2.pt")
    written = pool.stat().st_mtime_ns
    fit("transformer", root, "--data.init_args.pool=256")
    assert pool.stat().st_mtime_ns == written


def test_principal_components_are_those_of_the_patches():
    """Against a singular value decomposition of the patches, up to sign."""
    images = draw_batch(64, seed=4, index=0)["image"].double()
    kernel = pretrain.principal_components(images, patch=4, count=5).flatten(1)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    expected = torch.linalg.svd(patches, full_matrices=False).Vh[:5]
    assert torch.allclose((kernel @ expected.mT).abs(), torch.eye(5).double(), atol=1e-6)


def test_autoencoder_loss_is_least_at_the_principal_components(vae):
    """The KL divergence of two Gaussians from torch.distributions, and the squared error, add up to the loss."""
    module = pretrain.AutoencoderPretraining(kl_weight=0.5, prior_std=0.2)
    image = draw_batch(8, seed=5, index=0)["image"]
    with torch.no_grad():
        posterior = module.network.encode(image).latent_dist
        center = torch.nn.functional.conv2d(image, module.kernel, stride=4)
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(center, 0.2)).mean()
        latents = posterior.sample(torch.Generator().manual_seed(0))
        error = (module.network.decode(latents).sample - image).square().mean()
        module.log_dict = lambda *_, **__: None  # outside a Trainer there is no logger
        loss = module.loss({"image": image}, torch.Generator().manual_seed(0))
        assert float(loss) == pytest.approx(float(error + 0.5 * kl), rel=1e-4)


def test_load_vae_standardises_the_latents(vae):
    """On images that it has not measured."""
    network = pretrain.load_vae(str(vae))
    with torch.no_grad():
        latents = network.encode(draw_batch(256, seed=9, index=0)["image"]).latent_dist.mean
    latents = (latents - network.config.shift_factor) * network.config.scaling_factor
    assert float(latents.mean()) == pytest.approx(0, abs=0.02)
    assert float(latents.std()) == pytest.approx(1, abs=0.02)
    assert not any(weight.requires_grad for weight in network.parameters())
    assert not network.training


def test_pool_holds_the_stream(vae, transformer):
    """A row of the pool is the encoded image, its text the stock pipeline's embedding, the first text the empty one."""
    data = pretrain.ShapesLatents(vae=str(vae), pool=256, batch_size=64)
    data.prepare_data()
    data.setup("fit")
    stream = draw_batch(128, seed=2, index=1)
    network = pretrain.load_vae(str(vae))
    pipeline = pretrain.build_pipeline(network, components.build_transformer())
    embeds, _, pooled, _ = pipeline.encode_prompt(
        ["", *stream["caption"][:8]], None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    assert torch.allclose(data.embeds[data.text[128:136]], embeds[1:], atol=1e-5)
    assert torch.allclose(data.pooled[data.text[128:136]], pooled[1:], atol=1e-5)
    with torch.no_grad():
        mean = network.encode(stream["image"][:8]).latent_dist.mean
    mean = (mean - network.config.shift_factor) * network.config.scaling_factor
    assert torch.allclose(data.mean[128:136], mean, atol=0.02)  # stored in half precision
    batch, again = data.make(5), data.make(5)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["latents"], data.make(6)["latents"])
    assert batch["latents"].shape == (64, 16, 6, 6)
    assert torch.allclose(batch["empty_embeds"], embeds[:1], atol=1e-5)
    assert torch.allclose(batch["empty_pooled"], pooled[:1], atol=1e-5)


def test_transformer_stage_needs_the_first(tmp_path):
    with pytest.raises(ValueError, match=r"data\.vae is .*last\.ckpt, but there is no such checkpoint: run"):
        fit("transformer", tmp_path)


def test_loss_is_that_of_the_velocity(vae, transformer):
    """A network whose velocity is zero, as at the start, leaves E|noise - x0|² per value: 1 + the latents' square."""
    data = pretrain.ShapesLatents(vae=str(vae), pool=256, batch_size=256)
    data.prepare_data()
    data.setup("fit")
    module, batch = pretrain.FlowMatchingPretraining(), data.make(0)
    with torch.no_grad():
        expected = 1 + float(batch["latents"].square().mean())
        assert float(module.loss(batch, torch.Generator().manual_seed(0))) == pytest.approx(expected, rel=0.02)


def test_each_weight_has_one_optimizer():
    """Muon has the blocks' matrices but for those of the modulation, AdamW everything else."""
    module = pretrain.FlowMatchingPretraining()
    module.trainer = L.Trainer(max_steps=10, logger=False, enable_checkpointing=False, accelerator="cpu")
    (adamw, muon), schedules = module.configure_optimizers()
    groups = [{id(w) for group in o.param_groups for w in group["params"]} for o in (adamw, muon)]
    named = dict(module.network.named_parameters())
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(weight) for weight in named.values()}
    matrices = {name for name, weight in named.items() if id(weight) in groups[1]}
    assert matrices
    assert all("transformer_blocks" in name and named[name].ndim == 2 for name in matrices)
    assert not any("norm1" in name for name in matrices)
    assert len(schedules) == 2


def test_stream_goes_on_from_a_number():
    batches = list(islice(pretrain._Stream(lambda index: index, 7), 3))
    assert batches == [7, 8, 9]


def sample(pipeline, steps=2):
    generator = torch.Generator().manual_seed(0)
    captions = ["a red circle on gray", "two squares on black"]
    size = {"height": 24, "width": 24, "max_sequence_length": 0, "output_type": "np"}
    return pipeline(captions, num_inference_steps=steps, guidance_scale=2.0, generator=generator, **size).images


def load_stock(folder):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_stock_diffusers_loads_and_samples_the_export(folder, vae, transformer):
    pipeline = load_stock(folder)
    images = sample(pipeline)
    assert images.shape == (2, 24, 24, 3)
    assert np.isfinite(images).all()
    for network, checkpoint in ((pipeline.transformer, transformer), (pipeline.vae, vae)):
        averaged = part(load(checkpoint)["state_dict"], "averaged.")
        assert changed(averaged, network.state_dict()) == 0
    assert pipeline.scheduler.config.shift == components.SHIFT


def test_export_embeds_text_as_training_did(folder, vae, transformer):
    """The folder is often written by another process than the one that cached the embeddings."""
    pool = torch.load(vae.with_name("latents-256-2.pt"))
    captions = [text for index in range(2) for text in draw_batch(128, 2, index)["caption"]]
    backbone = SD3Backbone(str(folder), max_sequence_length=0)
    condition = backbone.encode_text(captions[:32])
    assert torch.allclose(condition.embeds, pool["embeds"][pool["text"][:32]], atol=1e-5)
    assert torch.allclose(condition.pooled, pool["pooled"][pool["text"][:32]], atol=1e-5)


def test_main_runs_the_stages_in_order_with_overrides_then_exports(monkeypatch):
    calls = []
    monkeypatch.setattr(pretrain, "fit", lambda *words: calls.append(words))
    monkeypatch.setattr(pretrain, "export", lambda *paths: calls.append(("export", *paths)))
    monkeypatch.setattr(sys, "argv", ["pretrain", "--root", "here", "--compile", "--trainer.devices=1"])
    pretrain.main()
    here = Path("here")
    checkpoints = [here / stage / "last.ckpt" for stage in pretrain.STAGES]
    assert calls == [
        ("vae", here, "--trainer.devices=1"),
        ("transformer", here, "--model.init_args.compile=true", "--trainer.devices=1"),
        ("export", *checkpoints, here / "pipeline"),
    ]
    calls.clear()
    monkeypatch.setattr(sys, "argv", ["pretrain", "--stage", "vae"])
    pretrain.main()
    assert calls == [("vae", Path("runs/teacher"))]


# ---------------------------------------------------------------- the teacher in the package


@pytest.fixture(scope="module")
def shipped():
    return Path(locate("embedded://shapes"))


def test_shipped_teacher_is_small(shipped):
    parts = [path for path in shipped.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in parts) <= 12e6
    assert {path.suffix for path in parts} <= {".json", ".safetensors", ".txt"}  # nothing that has to be unpickled


def test_stock_diffusers_loads_and_samples_the_shipped_teacher(shipped):
    images = sample(load_stock(shipped), steps=4)
    assert images.shape == (2, 24, 24, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0.05


def test_shipped_text_parts_are_those_of_the_code(shipped):
    """The teacher was trained on embeddings by ``components``; the folder must give the same."""
    pipeline = load_stock(shipped)
    tokenizer = components.build_tokenizer()
    assert pipeline.tokenizer.get_vocab() == pipeline.tokenizer_2.get_vocab() == tokenizer.get_vocab()
    for seed, mixing, encoder in ((1, 1.0, pipeline.text_encoder), (2, 0.2, pipeline.text_encoder_2)):
        built, found = components.build_text_encoder(tokenizer, seed, mixing).state_dict(), encoder.state_dict()
        assert built.keys() == found.keys()
        assert all(torch.allclose(built[name], found[name], atol=1e-5) for name in built)


@pytest.mark.slow
def test_shipped_teacher_is_good_and_leaves_something_to_distil(shipped):
    """What the demo stands on: right and crisp with many steps, neither with few."""
    backbone, captions = SD3Backbone(str(shipped), max_sequence_length=0), evaluation_captions(per_category=20)
    network, words = backbone.new_network().eval(), [str(caption) for caption in captions]
    many, four, two = (
        evaluate(backbone, Entrant("teacher", network, steps, guidance=3.0), words, ShapesScore()).scores["overall"]
        for steps in (40, 4, 2)
    )
    assert many >= 0.85
    assert four <= many - 0.1
    assert two <= many - 0.3
