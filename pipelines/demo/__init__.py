"""The demo: drawn images, a small autoencoder and a judge for them, and all stages in a row."""
