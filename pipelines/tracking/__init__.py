"""MLflow: runs, metrics, the model registry, and provenance."""
