"""The endpoint: what stays up. It reads a generator and answers over HTTP; it shares nothing with `pipelines` but files."""
