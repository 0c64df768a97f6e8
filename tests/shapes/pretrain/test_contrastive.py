"""Stage ``clip``."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from advdmd_lightning.shapes.checker import read
from advdmd_lightning.shapes.grammar import CATEGORIES, captions, parse
from advdmd_lightning.shapes.pretrain import ContrastivePretraining, ShapesPairs, contrastive, export_clip
from advdmd_lightning.shapes.pretrain.contrastive import CANDIDATES, contrastive_loss
from tests.shapes.pretrain.short import changed, load, part


def test_loss_is_clips_own_where_every_image_has_its_caption():
    """The mean of the two cross-entropies with the diagonal as classes, as transformers computes it."""
    logits = torch.randn(5, 5, dtype=torch.float64)
    own = torch.arange(5)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(5).bool()), expected)


def test_true_pairs_share_the_target():
    """One caption for two images, two captions for one image: probabilities of torch's soft cross-entropy."""
    true = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]).bool()  # nothing shows the last caption
    logits = torch.randn(3, 4, dtype=torch.float64)
    rows, columns = true.double(), true.mT[:3].double()
    expected = (
        F.cross_entropy(logits, rows / rows.sum(1, keepdim=True))
        + F.cross_entropy(logits.mT[:3], columns / columns.sum(1, keepdim=True))
    ) / 2
    torch.testing.assert_close(contrastive_loss(logits, true), expected)


def test_shared_target_is_reached_by_equal_logits_of_the_true_ones():
    true = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
    found = float(contrastive_loss(1000 * true.double(), true))
    assert found == pytest.approx((math.log(2) / 2) / 2)  # nats of choosing between two, in one of two rows, one way


def test_candidates_are_the_training_captions():
    held_out = {str(caption) for category in CATEGORIES for caption in captions(category, held_out=True)}
    texts = [str(caption) for caption in CANDIDATES]
    assert not held_out & set(texts)
    assert len(set(texts)) == len(texts) == 369 - len(held_out)


def test_truth_is_what_the_checker_reads_in_the_image():
    """The labels come from the scene; here the picture itself is read back."""
    batch = ShapesPairs(batch_size=64, seed=11).make(2)
    readings = read(batch["image"])
    expected = torch.tensor([[reading.matches(caption) for caption in CANDIDATES] for reading in readings])
    assert (batch["true"] == expected).float().mean() > 0.9999  # a relation near 45 degrees may tip
    assert batch["true"].any(1).all()


def test_both_orders_and_the_mirrored_relation_are_true():
    texts = [str(caption) for caption in CANDIDATES]
    pairs = ShapesPairs(batch_size=200, seed=1).make(0)["true"]
    mirrored = {" left of ": " right of ", " above ": " below "}
    for text in texts:
        for word, other in {" and ": " and ", **mirrored}.items():
            head, ground = text.rsplit(" on ", 1)
            first, found, second = head.partition(word)
            twin = f"{second}{other}{first} on {ground}"
            if found and twin in texts:
                assert torch.equal(pairs[:, texts.index(text)], pairs[:, texts.index(twin)])


def test_batches_follow_from_their_number():
    data = ShapesPairs(batch_size=8, seed=3)
    batch, again, other = data.make(5), data.make(5), data.make(6)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["image"], other["image"])
    assert batch["image"].shape == (8, 3, 24, 24)
    assert batch["true"].shape == (8, len(CANDIDATES))


def test_module_compares_each_image_with_every_caption():
    module = ContrastivePretraining()
    module.log_dict = lambda *_, **__: None  # outside a Trainer there is no logger
    batch = ShapesPairs(batch_size=4, seed=0).make(0)
    processor = contrastive.components.build_clip_processor()
    texts = processor.tokenizer([str(c) for c in CANDIDATES], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = module.network(**texts, pixel_values=batch["image"]).logits_per_image
        loss = module.loss(batch, torch.Generator())
    torch.testing.assert_close(loss, contrastive_loss(logits, batch["true"]))


def test_stock_transformers_loads_the_export(clip, tmp_path):
    export_clip(clip, tmp_path)
    model, processor = CLIPModel.from_pretrained(tmp_path), CLIPProcessor.from_pretrained(tmp_path)
    assert changed(part(load(clip)["state_dict"], "averaged."), model.state_dict()) == 0
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    text = str(parse("a red circle on gray"))
    seen = model(**processor(text=[text, "two circles on white"], images=[image], return_tensors="pt", padding=True))
    assert seen.logits_per_image.shape == (1, 2)
    assert seen.image_embeds.shape == (1, 64)


def test_a_few_steps_lower_the_loss():
    module = ContrastivePretraining()
    module.log_dict = lambda *_, **__: None
    batch = ShapesPairs(batch_size=16, seed=0).make(0)
    optimizer = torch.optim.AdamW(module.network.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        losses.append(module.loss(batch, torch.Generator()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
