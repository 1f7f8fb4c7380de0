"""Stage 1: images -> a latent dataset, with Ray Data."""
