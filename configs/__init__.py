"""The packaged recipes: complete YAML files, found by name (see ``advdmd_lightning.recipes``)."""
