"""Stage 3: samples a generator and measures FID and related metrics."""
