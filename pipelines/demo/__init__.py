"""The demo: drawn images, a small autoencoder and a judge for them, and a command that runs all stages."""
