"""A process of runs that save while they train, ``torchrun ... tests/saving.py '{"folder": ...}'``.

``tests/test_checkpoints.py`` reads what came out.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from pathlib import Path


def main(folder: str, nodes: int = 1) -> None:
    """Run three trainings, in each of which the disk does something else."""
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch import Tensor
    from torch.distributed.tensor import DTensor
    from torch.utils._pytree import tree_map_only

    from advdmd_lightning import strategies
    from advdmd_lightning.settings import GRPOSettings, GuidanceSettings
    from tests.training import tiny_data, tiny_module

    torch.set_num_threads(1)
    root, gate, found = Path(folder), Path(folder) / "open", {}

    class Disk(strategies.FolderWriter):
        """Slow, waiting for a file, or losing the folder, by the checkpoint's name."""

        def write_data(self, *arguments):
            if self.place.name == "step=4.ckpt":
                while not gate.exists():
                    time.sleep(0.01)
            if self.place.parent.name == "names" and self.place.name == "step=1.ckpt" or self.place.name == "stop.ckpt":
                time.sleep(1)
            if self.place.name == "lost.ckpt" and self.place.exists():  # the second time
                shutil.rmtree(self.path, ignore_errors=True)
            return super().write_data(*arguments)

    strategies.FolderWriter = Disk

    def state(trainer):
        """What is saved, whole and on its own."""
        held = {
            "state_dict": trainer.strategy.lightning_module_state_dict(),
            "optimizers": [trainer.strategy.optimizer_state(optimizer)["state"] for optimizer in trainer.optimizers],
        }
        whole = tree_map_only(DTensor, lambda tensor: tensor.full_tensor(), held)
        return tree_map_only(Tensor, Tensor.clone, whole)

    def names(name):
        return sorted(path.name for path in (root / name).iterdir())

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 4:
                found["saved"] = state(trainer)
                found["when it began"] = names("gated")

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                found["later"] = state(trainer)
                found["under way"] = names("gated")
                threading.Timer(0.5, gate.touch).start()
                trainer.save_checkpoint(root / "gated" / "next.ckpt")
                found["at the next save"] = names("gated")

    class Lose(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(root / "lost" / "lost.ckpt")

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 2
            if trainer.should_stop:
                trainer.save_checkpoint(root / "names" / "stop.ckpt")
                found["at the last save"] = names("names")

    def run(steps, *callbacks):
        trainer = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="fsdp2",
            max_steps=steps,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=root,
        )
        module = tiny_module(grpo=GRPOSettings(weight=0), guidance=GuidanceSettings(updates=1))
        trainer.fit(module, tiny_data(batch_size=2))

    def keep(name, **options):
        return ModelCheckpoint(root / name, "{step}", **options)

    run(5, Watch(), keep("gated", every_n_train_steps=2))
    found["after the training"] = names("gated")
    run(
        2,
        Stop(),
        keep("names", every_n_train_steps=1),
        keep("names", every_n_train_steps=1, save_top_k=-1, monitor="step"),
    )
    found["two callbacks"] = names("names")
    try:
        run(2, Lose())
    except RuntimeError as error:
        found["error"] = str(error)
    found["after an error"] = names("lost")
    if torch.distributed.get_rank() == 0:
        torch.save(found, root / "found.pt")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
