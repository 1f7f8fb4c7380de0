"""The text and the commands of the README and of the pages below docs/, for the tests that run or parse them."""

import json
import re
from pathlib import Path

from pipelines.main import MODULES

REPOSITORY = Path(__file__).parents[2]


def text_of(name: str) -> str:
    """The text of a file of the repository; a notebook as Markdown, with its shell commands in bash blocks."""
    text = (REPOSITORY / name).read_text()
    return _as_markdown(json.loads(text)) if name.endswith(".ipynb") else text


def _as_markdown(notebook: dict) -> str:
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source.startswith("!"):
            commands = "\n".join(line.removeprefix("!") for line in source.splitlines())
            parts.append(f"```bash\n{commands}\n```")
        else:
            parts.append("```python\n" + re.sub(r"^%.*$", "", source, flags=re.MULTILINE) + "\n```")
    return re.sub(r"-->\n\n```", "-->\n```", "\n\n".join(parts) + "\n")


def commands(name: str, page: str = "README.md") -> list[str]:
    """The lines of the code blocks that follow the comment <!-- name: ... --> on a page.

    `meanflow train` is replaced by `python -m pipelines.train`, which tests run in their own process.
    """
    blocks = re.findall(rf"<!-- {name}: .*? -->\n```bash\n(.*?)```", text_of(page), re.DOTALL)
    assert blocks, f"no block {name} in {page}"
    lines = [line for block in blocks for line in block.splitlines() if line]
    return [re.sub(r"^meanflow ([\w-]+)", lambda found: f"python -m {MODULES[found[1]]}", line) for line in lines]
