"""The data module through a real Trainer: resume is an equality, and settings mean what they say."""

from __future__ import annotations

import hashlib
import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DistributedSampler

from advdmd_lightning.data import ImageCaptionDataModule, ShapesCaptions, ShapesStream
from advdmd_lightning.shapes.grammar import evaluation_captions

STEPS = 4  # in an epoch: 14 samples, batches of 3


class Recorder(L.LightningModule):
    """A real, tiny model that writes down what it sees."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        digest = hashlib.sha256(batch["image"].numpy().tobytes()).hexdigest()
        self.seen.append((self.current_epoch, batch_idx, digest, tuple(batch["caption"])))
        return self.linear(batch["image"].mean((2, 3))).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.validated += zip(batch["index"].tolist(), batch["caption"], strict=True)

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data_module(**changes):
    settings = {"source": ShapesStream(seed=1, length_per_epoch=14), "batch_size": 3, "seed": 5} | changes
    return ImageCaptionDataModule(**settings)


def trainer(folder, max_steps=-1, callbacks=(), **settings):
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fit(folder, max_steps, data, checkpoint=None, **settings):
    model = Recorder()
    trainer(folder, max_steps, **settings).fit(model, data, ckpt_path=checkpoint, weights_only=False)
    return model.seen


@pytest.fixture(scope="module", params=[0, 2], ids=["workers0", "workers2"])
def whole_run(request, tmp_path_factory):
    """Three epochs in one go, with a checkpoint after every step and after every epoch."""
    folder = tmp_path_factory.mktemp("run")
    steps = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    epochs = ModelCheckpoint(folder, filename="end-{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    return (
        request.param,
        folder,
        fit(folder, 3 * STEPS, data_module(num_workers=request.param), callbacks=(steps, epochs)),
    )


def test_epochs_are_counted_and_differ(whole_run):
    _, _, seen = whole_run
    assert [(epoch, step) for epoch, step, *_ in seen] == [(e, s) for e in range(3) for s in range(STEPS)]
    assert len({digest for _, _, digest, _ in seen}) == 3 * STEPS
    assert all(len(captions) == 3 for *_, captions in seen)


@pytest.mark.parametrize("name", ["step=1", "step=3", "step=4", "step=6", "step=8", "end-epoch=0", "end-epoch=1"])
def test_resume_is_an_equality(whole_run, name):
    workers, folder, seen = whole_run
    done = int(name[5:]) if name.startswith("step") else STEPS * (int(name[-1]) + 1)
    assert fit(folder, 3 * STEPS, data_module(num_workers=workers), folder / f"{name}.ckpt") == seen[done:]


def test_resume_with_other_workers(whole_run):
    workers, folder, seen = whole_run
    assert fit(folder, 3 * STEPS, data_module(num_workers=2 - workers), folder / "step=6.ckpt") == seen[6:]


def test_resume_with_another_batch_size_goes_on_in_the_same_order(whole_run):
    workers, folder, seen = whole_run
    resumed = fit(folder, 10, data_module(num_workers=workers, batch_size=6), folder / "step=6.ckpt")
    expected = [caption for *_, captions in seen[6:10] for caption in captions]
    assert [caption for *_, captions in resumed[:2] for caption in captions] == expected


def test_resume_warns_of_another_order(whole_run):
    workers, folder, seen = whole_run
    with pytest.warns(UserWarning, match="seed is 6, but the checkpoint was written with 5"):
        resumed = fit(folder, 8, data_module(num_workers=workers, seed=6), folder / "step=6.ckpt")
    assert resumed != seen[6:8]


def test_epochs_cut_short_leave_nothing_out(whole_run):
    workers, folder, seen = whole_run
    cut = fit(folder, 3 * STEPS, data_module(num_workers=workers), limit_train_batches=3)
    assert [digest for _, _, digest, _ in cut] == [digest for _, _, digest, _ in seen]
    assert cut[3][:2] == (1, 0)


def test_steps_per_epoch(tmp_path):
    seen = fit(tmp_path, 6, data_module(steps_per_epoch=5))
    assert [entry[:2] for entry in seen[-2:]] == [(0, 4), (1, 0)]
    assert len({digest for _, _, digest, _ in seen}) == 6


def test_each_pass_is_another_visit():
    loader = data_module(source=ShapesStream(length_per_epoch=4), batch_size=2).train_dataloader()
    images = [image.numpy().tobytes() for _ in range(3) for batch in loader for image in batch["image"]]
    assert len(set(images)) == len(images) == 12


def test_overfitting_repeats_one_batch(tmp_path):
    with pytest.warns(UserWarning, match="overfit"):
        seen = fit(tmp_path, 3, data_module(), overfit_batches=1)
    assert len({digest for _, _, digest, _ in seen}) == 1


def test_ranks_come_from_the_trainer(tmp_path):
    data = data_module()
    data.trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", default_root_dir=tmp_path, logger=False)
    sampler = data.train_dataloader().sampler
    assert isinstance(sampler, DistributedSampler), "or Lightning puts its own sampler around it"
    assert (sampler.num_replicas, sampler.rank, sampler.steps_per_epoch) == (2, 0, 2)


def test_written_in_yaml(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        """
        data:
          class_path: advdmd_lightning.data.ImageCaptionDataModule
          init_args:
            source: {class_path: advdmd_lightning.data.ShapesStream, init_args: {seed: 3}}
            validation: {class_path: advdmd_lightning.data.ShapesCaptions}
            batch_size: 2
        """
    )
    words = ["--config", str(config), "--data.init_args.steps_per_epoch", "7", "--trainer.logger", "false"]
    cli = LightningCLI(Recorder, subclass_mode_data=True, args=words, run=False)
    assert len(cli.datamodule.train_dataloader()) == 7
    assert cli.datamodule.source.seed == 3
    assert len(cli.datamodule.validation) == 600
    with pytest.raises(SystemExit):
        LightningCLI(Recorder, subclass_mode_data=True, args=[*words, "--data.source.sed", "1"], run=False)


def test_loaders_leave_the_global_generators_alone():
    data = data_module(validation=ShapesCaptions(1))
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    for loader in (data.train_dataloader(), data.test_dataloader()):
        list(loader)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_validation_gives_every_caption_in_order(tmp_path, stage):
    model = Recorder()
    data = data_module(validation=ShapesCaptions(2), validation_batch_size=5)
    getattr(trainer(tmp_path), stage)(model, datamodule=data)
    assert model.validated == list(enumerate(map(str, evaluation_captions(2))))


def test_validation_within_fit(tmp_path):
    model = Recorder()
    data = data_module(validation=ShapesCaptions(1))
    trainer(tmp_path, STEPS, num_sanity_val_steps=0).fit(model, data)
    assert [index for index, _ in model.validated] == list(range(6))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_no_validation_source(tmp_path, stage):
    with pytest.raises(ValueError, match=r"data\.validation is not set"):
        getattr(trainer(tmp_path), stage)(Recorder(), datamodule=data_module())


def test_fewer_captions_than_processes():
    data = data_module(validation=ShapesCaptions(1))
    data.trainer = L.Trainer(accelerator="cpu", devices=7, strategy="ddp", logger=False)
    with pytest.raises(ValueError, match=r"data\.validation has 6 samples for 7 processes: predict on 6 at most"):
        data.predict_dataloader()


@pytest.mark.parametrize(
    ("key", "value"),
    [("batch_size", 0), ("num_workers", -1), ("seed", -1), ("steps_per_epoch", 0), ("validation_batch_size", 0)],
)
def test_numbers_out_of_range(key, value):
    with pytest.raises(ValueError, match=rf"data\.{key} is {value}: set"):
        data_module(**{key: value})
