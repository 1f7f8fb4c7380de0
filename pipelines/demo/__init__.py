"""The demo: drawn images, a small autoencoder and a judge trained on them, and all stages in a row."""
