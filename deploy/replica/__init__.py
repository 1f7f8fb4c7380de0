"""The generator side of the endpoint: batches requests and runs the model. No HTTP."""
