"""Stage 2: a latent dataset -> a generator, with Ray Train."""
