"""Stage ``transformer``."""

from __future__ import annotations

import pytest
import torch

from advdmd_lightning.shapes import components, pretrain
from advdmd_lightning.shapes.stream import draw_batch
from tests.shapes.pretrain.short import fit, load, part


def test_transformer_stage_starts_from_zero_and_encodes_the_pool_once(root, vae, transformer):
    trained = part(load(transformer)["state_dict"], "network.")
    assert trained["proj_out.weight"].any()
    assert not components.build_transformer().state_dict()["proj_out.weight"].any()
    pool = vae.with_name("latents-256-2.pt")
    written = pool.stat().st_mtime_ns
    fit("transformer", root, "--data.init_args.pool=256")
    assert pool.stat().st_mtime_ns == written


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
