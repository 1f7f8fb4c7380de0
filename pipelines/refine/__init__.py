"""Post-trains a generator with the Frechet loss of its images."""
