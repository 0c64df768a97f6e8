"""``python -m advdmd_lightning`` is ``advdmd``."""

from advdmd_lightning.cli import main

if __name__ == "__main__":
    main()
