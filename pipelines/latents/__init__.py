"""The latent dataset: manifest, shards, random access, and each node's copy."""
