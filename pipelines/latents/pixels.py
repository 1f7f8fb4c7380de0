"""The name of the autoencoder of datasets that have none. Apart from manifest.py, which imports torch."""

PIXELS = "pixels"  # value of --vae, and `vae_id` of such a dataset
