"""Before renting GPUs: what a recipe needs of each."""
