"""Trains an autoencoder on any images: pixels -> latents -> pixels."""
