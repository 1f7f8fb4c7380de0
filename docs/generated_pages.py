"""Reference pages that come from the code: commands, presets, settings and routes of the endpoint."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

from deploy.api.routes import build_http_app
from deploy.settings import API_SETTINGS, GENERATOR_SETTINGS, Arguments
from meanflow_core.config import RefineConfig, TrainingConfig
from meanflow_core.presets import presets_of
from pipelines.main import MODULES, WITH_PRESETS

NOTE = "<!-- Written by docs/generated_pages.py. -->\n\n"
PRESET = "xl2"


def write_pages(folder: Path) -> None:
    """Writes commands.md, presets.md, endpoint.md and openapi.json, unless they are up to date."""
    document = openapi()
    pages = {
        "commands.md": commands_page(),
        "presets.md": presets_page(),
        "endpoint.md": endpoint_page(document),
        "openapi.json": json.dumps(document, indent=1),
    }
    for name, text in pages.items():
        file = folder / name
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


def openapi() -> dict[str, Any]:
    """The OpenAPI document of an endpoint with default settings."""
    service: Any = SimpleNamespace(settings=Arguments(model="none"), recorder=None)
    return build_http_app(service).openapi()


def _cell(text: str) -> str:
    """A text in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def help_of(words: list[str]) -> str:
    """What a command prints with --help, at 100 columns."""
    program = Path(sys.executable).with_name("meanflow")
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    result = subprocess.run([program, *words], capture_output=True, text=True, env=environment, check=True)
    return result.stdout.rstrip()


def commands_page() -> str:
    """All commands with their options."""
    lines = [
        NOTE + "# Commands\n",
        f"```text\n{help_of(['--help'])}\n```\n",
        "`python -m` and the module's name start the same command: `python -m pipelines.train` is `meanflow train`.\n",
    ]
    for command, module in MODULES.items():
        lines.append(f"## meanflow {command}\n\nModule `{module}`.\n")
        lines.append(f"```text\n{help_of([command, '--help'])}\n```\n")
        if command in WITH_PRESETS:
            options = help_of([command, PRESET, "--help-all"])
            lines.append(f"All options, with the defaults of the preset `{PRESET}`:\n\n```text\n{options}\n```\n")
    return "\n".join(lines)


def presets_page() -> str:
    """All presets by module, with their docstrings."""
    lines = [
        NOTE + "# Presets\n",
        "A preset is a function that returns a full configuration. Every field can be replaced on the command line: "
        "`meanflow train xl2 --num-steps 200160`. `module:function` names a preset of your own. FIDs in this table are the "
        "papers'. **None of the presets for ImageNet has been trained with this code yet.**\n",
    ]
    for kind, command in ((TrainingConfig, "train"), (RefineConfig, "refine")):
        module = None
        for name, preset in presets_of(kind).items():
            if preset.__module__ != module:
                module = preset.__module__
                about = (sys.modules[module].__doc__ or "").splitlines()[0]
                lines.append(f"\n## meanflow {command}: {about.rstrip('.')}\n")
                lines.append("| preset | batch | steps | |\n|---|---|---|---|")
            config = preset()
            text = _cell(inspect.getdoc(preset) or "")
            lines.append(f"| `{name}` | {config.global_batch_size:,} | {config.num_steps:,} | {text} |")
    return "\n".join(lines) + "\n"


def endpoint_page(document: dict[str, Any]) -> str:
    """The settings and the routes of the endpoint. document: OpenAPI's."""
    lines = [
        NOTE + "# Endpoint: settings and routes\n",
        "Settings are options of `meanflow serve` (`--max-batch-size 32`), and `args` of a Serve config "
        "(`max_batch_size: 32`). Those marked *in place* can also change while the endpoint runs, under `user_config`.\n",
        "## Settings\n",
        "| setting | default | |\n|---|---|---|",
    ]
    for name, field in Arguments.model_fields.items():
        default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)}`"
        choices = [f"`{choice}`" for choice in get_args(field.annotation) if isinstance(choice, str)]
        text = _cell(field.description or "")
        if choices:
            text = f"One of {', '.join(choices)}. {text}"
        if name in GENERATOR_SETTINGS | API_SETTINGS:
            text += " *In place.*"
        lines.append(f"| `{name}` | {default} | {text} |")
    lines += [
        "",
        "## Routes\n",
        "The full description is {download}`openapi.json`; a running endpoint shows it at `/docs`.\n",
    ]
    lines.append("| route | |\n|---|---|")
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            text = operation.get("description", operation.get("summary", ""))
            lines.append(f"| `{method.upper()} {path}` | {_cell(text)} |")
    return "\n".join(lines) + "\n"
