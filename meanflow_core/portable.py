"""Portable generator folders, which contain their code and load without this package.

diffusers reads the pipeline's class from pipeline.py and a component's class from a file in the component's folder. Each
file must be self-contained, so modules of this package are concatenated into one.
"""

import ast
import importlib
import json
from pathlib import Path

# Each module follows the modules that it imports.
NETWORK_MODULES = ("networks.dual", "networks.interface", "networks.layers", "networks.dit", "networks.improved_dit")
PIPELINE_MODULES = ("formats", "latents", *NETWORK_MODULES, "autoencoder", "pipeline")
NETWORK_FILE = "meanflow_network"


def merged_source(modules: tuple[str, ...]) -> str:
    """Concatenates modules of this package. Removes their imports of each other and moves all other imports to the top."""
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
    header = '"""Written by meanflow-ray, so that diffusers can load this generator without meanflow-ray."""'
    return "\n\n\n".join([header, "\n".join(sorted(imports)), *bodies]) + "\n"


def add_code(folder: Path) -> None:
    """Makes a generator folder portable: adds the code and refers to it in model_index.json."""
    index = folder / "model_index.json"
    settings = json.loads(index.read_text())
    network_class = settings["transformer"][1]
    (folder / "pipeline.py").write_text(merged_source(PIPELINE_MODULES))
    (folder / "transformer" / f"{NETWORK_FILE}.py").write_text(merged_source(NETWORK_MODULES))
    settings["_class_name"] = ["pipeline", settings["_class_name"]]
    settings["transformer"] = [NETWORK_FILE, network_class]
    index.write_text(json.dumps(settings, indent=2) + "\n")
