"""A replica of the generator: batches requests and runs the model. Independent of Ray and HTTP."""
