"""``advdmd export``: from a run's checkpoint to files that stock diffusers loads."""
