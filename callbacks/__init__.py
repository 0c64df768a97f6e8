"""Lightning callbacks of the method (imported as ``advdmd_lightning.callbacks``)."""
