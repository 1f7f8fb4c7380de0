"""Source images: listing, indexing, reading, decoding and cropping."""
