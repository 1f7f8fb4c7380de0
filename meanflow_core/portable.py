"""Portable generator folders, which contain their code and load without this package.

diffusers reads the pipeline's class from pipeline.py and a component's class from a file in the component's folder. Each
file must be self-contained, so modules of this package are concatenated into one.
"""

import ast
import importlib
import json
from pathlib import Path

# Each module follows the modules that it imports.
NETWORK_MODULES = (
    f"{__package__}.references",
    *(
        f"{__package__}.networks.{name}"
        for name in ("dual", "interface", "layers", "dit", "improved_dit", "forward_mode")
    ),
)
PIPELINE_MODULES = (
    f"{__package__}.formats",
    f"{__package__}.latents",
    *NETWORK_MODULES,
    f"{__package__}.autoencoder",
    f"{__package__}.pipeline",
)
NETWORK_FILE = "meanflow_network"
REMEDY = "define the network in a module of its own, which imports torch and meanflow_core.networks only"


def merged_source(modules: tuple[str, ...]) -> str:
    """Concatenates modules. Removes their imports of this package and moves all other imports to the top.

    Raises ValueError if a module needs one of this package that is not among them, or if two define the same name.
    """
    imports: set[str] = set()
    defines: dict[str, str] = {}
    bodies = []
    for name in modules:
        source_file = importlib.import_module(name).__file__
        assert source_file is not None
        source = Path(source_file).read_text()
        lines = source.splitlines()
        for node in ast.parse(source).body:
            defined = getattr(node, "name", None)  # of a function or class
            if defined is not None and defines.setdefault(defined, name) != name:
                raise ValueError(f"{defines[defined]} and {name} both define {defined}; rename one of them")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                text = ast.unparse(node)
                needed = _own_module(node)
                if needed is None:
                    imports.add(text)
                elif needed not in modules:
                    raise ValueError(f"{name} imports {needed}, which a portable generator does not contain; {REMEDY}")
                first, last = node.lineno, node.end_lineno or node.lineno
                lines[first - 1 : last] = [""] * (last - first + 1)
        bodies.append("\n".join(lines).strip())
    header = '"""Written by meanflow-ray, so that diffusers can load this generator without meanflow-ray."""'
    return "\n\n\n".join([header, "\n".join(sorted(imports)), *bodies]) + "\n"


def _own_module(node: ast.Import | ast.ImportFrom) -> str | None:
    """The module of this package that a statement imports from; None for other imports."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return next((name for name in names if name.split(".")[0] == __package__), None)


def add_code(folder: Path) -> None:
    """Makes a generator folder portable: adds the code and refers to it in model_index.json.

    A network from outside this package is added with the module that defines it. Raises ValueError if that module imports
    other parts of this package than its networks.
    """
    index = folder / "model_index.json"
    settings = json.loads(index.read_text())
    network_class = settings["transformer"][1]
    config = json.loads((folder / "transformer" / "config.json").read_text())
    references = [settings["network_class"], config.get("module", "")]
    own = {name.partition(":")[0] for name in references} - {*NETWORK_MODULES, ""}
    network_modules = (*NETWORK_MODULES, *sorted(own))
    (folder / "pipeline.py").write_text(merged_source(PIPELINE_MODULES))
    (folder / "transformer" / f"{NETWORK_FILE}.py").write_text(merged_source(network_modules))
    settings["_class_name"] = ["pipeline", settings["_class_name"]]
    settings["transformer"] = [NETWORK_FILE, network_class]
    index.write_text(json.dumps(settings, indent=2) + "\n")
