from __future__ import annotations

import sys

import lightning as L
import pytest

from advdmd_lightning import cli, recipes
from tests.evaluation.conftest import untrained_folder  # noqa: F401  (a fixture)


@pytest.fixture(autouse=True)
def bare_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["advdmd"])


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that must be refused; returns what it printed as its reason."""
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_no_arguments_print_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("fit", "validate", "test", "predict", "advdmd recipes"))


def test_recipes_are_listed(capsys):
    cli.main(["recipes"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == recipes.recipe_names()


@pytest.mark.parametrize(
    "flag", [["--config", "no_such_recipe"], ["--config=no_such_recipe"], ["-c", "no_such_recipe"]]
)
def test_unknown_recipe_names_those_there_are(flag, capsys):
    reason = refused(["fit", *flag], capsys)
    assert "no packaged recipe" in reason
    assert all(name in reason for name in recipes.recipe_names())


def test_recipe_name_is_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text("# A recipe.\ntrainer:\n  no_such_key: 1\n")
    monkeypatch.setattr(recipes, "recipe_folder", lambda: tmp_path)
    assert "no_such_key" in refused(["fit", "--config", "mine"], capsys)


@pytest.mark.parametrize("section", ["trainer", "model", "data"])
def test_unknown_key_in_a_file_fails(section, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(f"{section}:\n  no_such_key: 1\n")
    assert "no_such_key" in refused(["fit", "--config", str(config)], capsys)


@pytest.mark.parametrize("key", ["--model.no_such_key", "--trainer.no_such_key", "--no_such_key"])
def test_unknown_option_fails(key, capsys):
    assert "no_such_key" in refused(["fit", key, "1"], capsys)


def test_optimizers_belong_to_the_module(capsys):
    assert "optimizer" in refused(["fit", "--optimizer", "torch.optim.AdamW"], capsys)


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_every_recipe_parses(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", name, "--print_config"])
    assert stop.value.code in (0, None)
    assert "model:" in capsys.readouterr().out


class Count(L.Callback):
    """Counts the cycles."""

    cycles = 0

    def on_train_batch_end(self, *_):
        self.cycles += 1


def test_callbacks_from_python_come_after_those_of_the_recipe(untrained_folder, tmp_path):  # noqa: F811
    count = Count()
    small = {
        "model.backbone.init_args.pretrained": untrained_folder,
        "model.discriminator.blocks": "[0]",
        "model.guidance.updates": 1,
        "data.batch_size": 2,
        "trainer.max_steps": 1,
        "trainer.logger": "false",
        "trainer.callbacks": '[{"class_path": "advdmd_lightning.callbacks.GeneratorEMA"}]',
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": tmp_path,
    }
    words = [f"--{key}={value}" for key, value in small.items()]
    done = cli.run(["fit", "--config", "shapes_4step_dmd2", *words], callbacks=[count])
    assert count.cycles == 1
    names = [type(callback).__name__ for callback in done.trainer.callbacks]
    assert names.index("GeneratorEMA") < names.index("Count")


REWARDS = """
model:
  rewards:
    - class_path: advdmd_lightning.rewards.CLIPScoreReward
      init_args: {pretrained: "embedded://shapes-clip", weight: 0.5, micro_batch: 32}
    - class_path: advdmd_lightning.rewards.ImageReward
      init_args: {function: advdmd_lightning.rewards.brightness}
    - class_path: advdmd_lightning.rewards.ImageReward
      init_args: {function: advdmd_lightning.rewards.sharpness, weight: 0.1}
    - class_path: advdmd_lightning.rewards.DiscriminatorReward
"""


def test_rewards_come_from_yaml(tmp_path):
    config = tmp_path / "rewards.yaml"
    config.write_text(REWARDS)
    parsed = cli.AdvDMDCLI(
        cli.AdvDMDModule,
        cli.ImageCaptionDataModule,
        args=["--config", "shapes_4step", "--config", str(config), f"--trainer.default_root_dir={tmp_path}"],
        run=False,
        auto_configure_optimizers=False,
        save_config_callback=None,
    )
    found = [(reward.name, reward.weight) for reward in parsed.model.rewards]
    assert found == [("clip_score", 0.5), ("brightness", 1.0), ("sharpness", 0.1), ("discriminator", 1.0)]
    assert parsed.model.rewards[0].micro_batch == 32
