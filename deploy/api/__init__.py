"""The HTTP API of the endpoint: routes, validation, API keys, image encoding. Uses FastAPI, but not Ray."""
