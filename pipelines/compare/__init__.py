"""Compares methods: trains flow matching, MeanFlow and its variants alike, and measures them alike."""
