"""A generator's folder that carries its code: it opens with diffusers alone, where this package is not installed.

diffusers reads a pipeline's class from pipeline.py, and a component's from a file in the component's folder; each must
stand alone, so this package's modules are written one after the other into one file.
"""

import ast
import importlib
import json
from pathlib import Path

# In the order of their imports of each other.
NETWORK_MODULES = ("dual", "transformer", "imf_transformer")
PIPELINE_MODULES = ("formats", "latents", "dual", "transformer", "imf_transformer", "autoencoder", "pipeline")
NETWORK_FILE = "meanflow_network"


def merged_source(modules: tuple[str, ...]) -> str:
    """The code of this package's modules as one module: imports of each other left out, the others once and first."""
    imports: set[str] = set()
    bodies = []
    for name in modules:
        source_file = importlib.import_module(f"{__package__}.{name}").__file__
        assert source_file is not None
        source = Path(source_file).read_text()
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                text = ast.unparse(node)
                if f" {__package__}." not in text:
                    imports.add(text)
                first, last = node.lineno, node.end_lineno or node.lineno
                lines[first - 1 : last] = [""] * (last - first + 1)
        bodies.append("\n".join(lines).strip())
    header = '"""Written by meanflow-ray beside a generator\'s weights, so that diffusers can open them by itself."""'
    return "\n\n\n".join([header, "\n".join(sorted(imports)), *bodies]) + "\n"


def add_code(folder: Path) -> None:
    """Makes a folder that `save_pretrained` wrote portable: adds the code, and names it in model_index.json."""
    index = folder / "model_index.json"
    settings = json.loads(index.read_text())
    network_class = settings["transformer"][1]
    (folder / "pipeline.py").write_text(merged_source(PIPELINE_MODULES))
    (folder / "transformer" / f"{NETWORK_FILE}.py").write_text(merged_source(NETWORK_MODULES))
    settings["_class_name"] = ["pipeline", settings["_class_name"]]
    settings["transformer"] = [NETWORK_FILE, network_class]
    index.write_text(json.dumps(settings, indent=2) + "\n")
