"""Image-caption pairs: sources and the LightningDataModule."""
