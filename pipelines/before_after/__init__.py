"""A refined generator beside the one that it was refined from, in trained-on and held-out extractors."""
