"""Stage 4: trains a generator on by the Frechet loss of its images."""
