"""One short run of the teacher's stages for all tests."""

from __future__ import annotations

import pytest

from advdmd_lightning.shapes.pretrain import export_pipeline
from tests.shapes.pretrain.short import fit


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("teacher")


@pytest.fixture(scope="session")
def vae(root):
    """Checkpoint of stage ``vae``."""
    fit("vae", root)
    return root / "vae" / "last.ckpt"


@pytest.fixture(scope="session")
def transformer(root, vae):
    """Checkpoint of stage ``transformer``."""
    fit("transformer", root, "--data.init_args.pool=256")
    return root / "transformer" / "last.ckpt"


@pytest.fixture(scope="session")
def clip(root):
    """Checkpoint of stage ``clip``."""
    fit("clip", root)
    return root / "clip" / "last.ckpt"


@pytest.fixture(scope="session")
def folder(root, vae, transformer):
    """The exported pipeline."""
    export_pipeline(vae, transformer, root / "pipeline")
    return root / "pipeline"
