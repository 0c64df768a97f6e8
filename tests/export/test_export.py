"""What stock diffusers makes of exported files is what our own sampler makes of the checkpoint."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.nn.functional import pixel_unshuffle

from advdmd_lightning import cli
from advdmd_lightning.flow import ODE, FlowSDE, Renoising
from tests.distributed import launch
from tests.evaluation.conftest import untrained_folder  # noqa: F401  (a fixture)
from tests.export.runs import CAPTIONS, export, stock, teacher, train, write_recipe

FORMS = [("sd3", "copies"), ("sd3", "adapters"), ("qwen", "adapters")]


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def run(request, tmp_path_factory):
    """A deterministic student: family, module, checkpoint."""
    return request.param[0], *train(tmp_path_factory.mktemp("run"), *request.param, transition=ODE())


def noise_of(module):
    return torch.randn(len(CAPTIONS), *module.backbone.latent_shape)


def images_of(pipeline, family, noise, steps=3):
    """Stock images in [-1, 1] by the call that the model card names."""
    if family == "qwen":
        noise = pixel_unshuffle(noise, 2).flatten(2).transpose(1, 2)
        arguments = {"true_cfg_scale": 1.0, "max_sequence_length": 16}
    else:
        arguments = {"guidance_scale": 1.0, "max_sequence_length": 4}
    size = {"height": 24, "width": 24, "output_type": "pt"}
    return pipeline(CAPTIONS, num_inference_steps=steps, latents=noise, **size, **arguments).images * 2 - 1


def test_stock_images_are_ours(run, tmp_path):
    family, module, checkpoint = run
    noise = noise_of(module)
    expected = module.sample(CAPTIONS, noise)
    found = images_of(stock(export(checkpoint, tmp_path / "out"), family), family, noise)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    untrained = images_of(stock(teacher(family), family), family, noise)
    assert (untrained - expected).abs().max() > 0.01


def test_without_average(run, tmp_path, capsys):
    family, module, checkpoint = run
    noise = noise_of(module)
    averaged = module.sample(CAPTIONS, noise)
    average, module.average = module.average, None
    expected = module.sample(CAPTIONS, noise)
    module.average = average
    out = export(checkpoint, tmp_path / "out", "--no-ema")
    assert "weights without average after 2 generator updates" in capsys.readouterr().out
    torch.testing.assert_close(images_of(stock(out, family), family, noise), expected, rtol=0, atol=1e-5)
    assert (averaged - expected).abs().max() > 1e-3


@pytest.mark.parametrize("run", FORMS[1:], ids="-".join, indirect=True)
@pytest.mark.parametrize("words", [[], ["--no-ema"]], ids=["average", "raw"])
def test_lora_file_is_the_merged_pipeline(run, words, tmp_path):
    family, module, checkpoint = run
    merged = stock(export(checkpoint, tmp_path / "merged", *words), family)
    out = export(checkpoint, tmp_path / "lora", "--lora", *words)
    pipeline = stock(teacher(family), family)
    pipeline.load_lora_weights(out)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(out, subfolder="scheduler")
    noise = noise_of(module)
    found, expected = (images_of(each, family, noise) for each in (pipeline, merged))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_noise_between_the_steps_is_that_of_training(tmp_path):
    """The stock pipeline draws it from the global generator, once per step, the last one included."""
    module, checkpoint = train(tmp_path, "sd3", transition=Renoising())
    pipeline = stock(export(checkpoint, tmp_path / "out"), "sd3")
    noise = noise_of(module)
    torch.manual_seed(7)
    found = images_of(pipeline, "sd3", noise)
    torch.manual_seed(7)
    x_t, condition = noise, module.backbone.encode_text(CAPTIONS)
    with torch.no_grad(), module.sampling_weights():
        for t, t_next in zip(module.grid[:-1], module.grid[1:], strict=True):
            step = module.transition(x_t, module.generator(x_t, t, condition), t, t_next)
            x_t = step.sample(torch.randn(noise.shape))
        expected = module.backbone.decode(x_t)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (images_of(pipeline, "sd3", noise) - expected).abs().max() > 0.01  # other noise


def test_step_that_no_stock_scheduler_takes(tmp_path, capsys):
    _, checkpoint = train(tmp_path, transition=FlowSDE(eta=0.5))
    out = export(checkpoint, tmp_path / "out")
    said = "not the one of the training**, `FlowSDE(eta=0.5)`, which no stock scheduler has"
    assert said in capsys.readouterr().out
    assert said in (out / "README.md").read_text()
    assert not stock(out, "sd3").scheduler.config.stochastic_sampling


def test_from_a_folder_of_shards(tmp_path):
    launch(2, tmp_path, name="run", strategy="fsdp2", cycles=2, save_at=2)
    assert (tmp_path / "run.ckpt").is_dir()
    words = ["--config", str(write_recipe(tmp_path / "recipe.yaml", "sd3", "copies", Renoising()))]
    expected = torch.load(tmp_path / "run.pt", weights_only=True)["student"]
    found = {}
    for name, more in (("average", []), ("raw", ["--no-ema"])):
        pipeline = stock(export(tmp_path / "run.ckpt", tmp_path / name, *words, *more), "sd3")
        found[name] = pipeline.transformer.state_dict()
    assert expected.keys() == found["average"].keys()
    differences = {name: max((found[name][w] - expected[w]).abs().max() for w in expected) for name in found}
    assert differences["average"] < 1e-6
    assert differences["raw"] > 1e-5


def small_run(folder, pretrained):
    """A run of one cycle from the command line, without average."""
    small = {
        "model.backbone.init_args.pretrained": pretrained,
        "model.discriminator.blocks": "[0]",
        "model.guidance.updates": 1,
        "data.batch_size": 2,
        "trainer.max_steps": 1,
        "trainer.logger.init_args.save_dir": folder,
        "trainer.callbacks": "[]",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": folder,
    }
    cli.run(["fit", "--config", "shapes_4step_dmd2", *(f"--{key}={value}" for key, value in small.items())])
    (checkpoint,) = folder.rglob("*.ckpt")
    return checkpoint


def test_recipe_of_the_run_and_code_of_the_card(untrained_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("sys.argv", ["advdmd"])
    checkpoint = small_run(tmp_path / "run", untrained_folder)
    export(checkpoint, tmp_path / "out", "--dtype", "bfloat16")
    card = (tmp_path / "out" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert code in capsys.readouterr().out
    made = {}
    exec(code, made)
    assert made["image"].size == (24, 24)
    made["pipe"].scheduler.set_timesteps(4)
    grid = torch.tensor([1, 9 / 11, 0.6, 1 / 3, 0])  # shift 1.5
    torch.testing.assert_close(made["pipe"].scheduler.sigmas, grid)
    for fact in ("as trained, no average, after 1 generator updates", str(untrained_folder), "version_0/config.yaml"):
        assert fact in card
