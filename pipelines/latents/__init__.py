"""The latent dataset that encode writes and train reads."""
