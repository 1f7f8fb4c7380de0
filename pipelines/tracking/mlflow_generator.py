"""The generator as an MLflow model: models from code, so that nothing is pickled. MLflow runs this file by its path."""

import io
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image

from meanflow_core.generator import load_pipeline


class GeneratorModel(PythonModel):
    """predict: rows of (class_label, seed) -> rows of (image_png); parameter num_inference_steps."""

    def load_context(self, context: PythonModelContext) -> None:
        """Opens the generator among the model's artifacts."""
        self._pipeline = load_pipeline(Path(context.artifacts["generator"]))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict | None = None
    ) -> pd.DataFrame:
        """One image per row, as the bytes of a PNG."""
        images = self._pipeline.images_from_seeds(
            model_input["class_label"].tolist(),
            model_input["seed"].tolist(),
            (params or {}).get("num_inference_steps", 1),
        )
        rows = []
        for image in images.cpu().numpy():
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="PNG")
            rows.append(buffer.getvalue())
        return pd.DataFrame({"image_png": rows})


mlflow.models.set_model(GeneratorModel())
