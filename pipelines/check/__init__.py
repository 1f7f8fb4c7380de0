"""Checks a latent dataset against its manifest and its images."""
