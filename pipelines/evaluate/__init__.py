"""Stage 3: draws samples from a generator and measures FID and related metrics."""
