"""AdvDMD for PyTorch Lightning: few-step students of text-to-image flow models.

The package's rooms and what each is for are described in the README; ``advdmd --help`` shows the command line.
"""

from pathlib import Path

__version__ = "0.1.0"
__all__ = ["AdvDMDModule", "ImageCaptionDataModule", "__version__"]

# In a checkout the subpackages `callbacks` and `configs` lie beside this folder, not inside it as in an installation:
# let the import system look there too, so that a checkout on sys.path works as an installed copy does.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.cfg").is_file():
    __path__.append(str(_checkout))

from advdmd_lightning.data import ImageCaptionDataModule  # noqa: E402  (after the path is complete)
from advdmd_lightning.module import AdvDMDModule  # noqa: E402
