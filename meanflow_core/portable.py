"""Portable generator folders, which contain their code and load without this package.

diffusers reads the pipeline's class from pipeline.py and a component's class from a file in the component's folder. Each
file must be self-contained, so modules of this package are concatenated into one.
"""

import ast
import importlib
import json
import sys
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
    f"{__package__}.predictions",
    f"{__package__}.sampling",
    f"{__package__}.latents",
    *NETWORK_MODULES,
    f"{__package__}.pixels",
    f"{__package__}.autoencoder",
    f"{__package__}.pipeline",
)
AUTOENCODER_MODULES = (f"{__package__}.pixels",)
NETWORK_FILE = "meanflow_network"
AUTOENCODER_FILE = "pixel_autoencoder"
PIXEL_AUTOENCODER = "PixelAutoencoder"  # the only autoencoder that is not a class of diffusers
REMEDY = (
    "define the network in one module, which imports installed libraries, and from this package only names, by "
    "from meanflow_core.networks.MODULE import NAME"
)


def merged_source(modules: tuple[str, ...]) -> str:
    """Concatenates modules. Removes their imports of this package and moves all other imports to the top.

    Raises ValueError if a module needs one that is not among them, from this package or from the module's own folder, or
    if two define the same name.
    """
    imports: set[str] = set()
    defines: dict[str, str] = {}
    bodies = []
    for name in modules:
        source = _source_file(name).read_text()
        lines = source.splitlines()
        for node in ast.parse(source).body:
            for defined in _defined_names(node):
                if defines.setdefault(defined, name) != name:
                    raise ValueError(f"{defines[defined]} and {name} both define {defined}; rename one of them")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                needed = _needed_modules(node, _source_file(name).parent)
                missing = [module for module in needed if module not in modules]
                is_plain = isinstance(node, ast.ImportFrom) and not any(alias.asname for alias in node.names)
                if needed and not is_plain and not name.startswith(f"{__package__}."):
                    missing = [ast.unparse(node)]  # other names do not survive the removal of the import
                if missing:
                    raise ValueError(f"{name} needs {missing[0]}, which a portable generator cannot contain; {REMEDY}")
                if not needed:
                    imports.add(ast.unparse(node))
                first, last = node.lineno, node.end_lineno or node.lineno
                lines[first - 1 : last] = [""] * (last - first + 1)
        bodies.append("\n".join(lines).strip())
    header = '"""Written by meanflow-ray, so that diffusers can load this generator without meanflow-ray."""'
    in_order = sorted(imports, key=lambda line: (not line.startswith("from __future__"), line))
    return "\n\n\n".join([header, "\n".join(in_order), *bodies]) + "\n"


def _defined_names(node: ast.stmt) -> list[str]:
    """The names that a statement of a module defines: of a function, a class or constants."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _source_file(module: str) -> Path:
    file = importlib.import_module(module).__file__
    assert file is not None
    return Path(file)


def _needed_modules(node: ast.Import | ast.ImportFrom, folder: Path) -> list[str]:
    """The modules of this package and of the importing module's folder that a statement imports."""
    if isinstance(node, ast.ImportFrom):
        names = ["." * node.level + (node.module or "")]
    else:
        names = [alias.name for alias in node.names]
    found = []
    for name in names:
        top = name.split(".")[0]
        is_beside = (folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file()
        if top in ("", __package__) or (is_beside and top not in sys.stdlib_module_names):
            found.append(name)
    return found


def _with_own_imports(modules: set[str]) -> set[str]:
    """These modules and the NETWORK_MODULES that they import, directly or not."""
    found, waiting = set(modules), list(modules)
    while waiting:
        file = _source_file(waiting.pop())
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                new = {*_needed_modules(node, file.parent)} & {*NETWORK_MODULES} - found
                found |= new
                waiting += new
    return found


def network_source(network_class: str, plain_module: str | None = None) -> str:
    """The code of a network, "module:Class", and of the plain module that it is made of, if any.

    A network from outside this package is added with the module that defines it. Raises ValueError if that module imports
    other parts of this package than its networks, or another module of its folder.
    """
    references = [network_class, *([plain_module] if plain_module else [])]
    needed = _with_own_imports({name.partition(":")[0] for name in references})
    ours = [name for name in NETWORK_MODULES if name in needed]
    source = merged_source((*ours, *sorted(needed - {*ours})))
    if plain_module:
        source += f"\n\nEMBEDDED_MODULES[{plain_module!r}] = {plain_module.partition(':')[2]}\n"
    return source


def add_code(folder: Path) -> None:
    """Makes a generator folder portable: adds the code and refers to it in model_index.json.

    Raises ValueError as `network_source` does.
    """
    index = folder / "model_index.json"
    settings = json.loads(index.read_text())
    network_class = settings["transformer"][1]
    plain_module = json.loads((folder / "transformer" / "config.json").read_text()).get("module_class")
    source = network_source(settings["network_class"], plain_module)
    (folder / "pipeline.py").write_text(merged_source(PIPELINE_MODULES))
    (folder / "transformer" / f"{NETWORK_FILE}.py").write_text(source)
    if settings["vae"][1] == PIXEL_AUTOENCODER:
        (folder / "vae" / f"{AUTOENCODER_FILE}.py").write_text(merged_source(AUTOENCODER_MODULES))
        settings["vae"] = [AUTOENCODER_FILE, PIXEL_AUTOENCODER]
    settings["_class_name"] = ["pipeline", settings["_class_name"]]
    settings["transformer"] = [NETWORK_FILE, network_class]
    index.write_text(json.dumps(settings, indent=2) + "\n")
