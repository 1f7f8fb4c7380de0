"""Stage 2: train a generator on a latent dataset with Ray Train."""
