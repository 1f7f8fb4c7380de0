"""The HTTP side of the endpoint: routes, validation, API keys, image encoding. FastAPI only, no Ray."""
