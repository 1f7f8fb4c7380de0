"""The endpoint: serves the images of a generator over HTTP. It shares only files with `pipelines`."""
