"""Feature extractors and reference statistics: what distances between sets of images are measured with."""
