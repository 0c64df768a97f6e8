"""Tests of ``advdmd_lightning.planning``."""
