"""The commands that README.md documents, for the tests that run or parse them."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def commands(name: str) -> list[str]:
    """The lines of the code block that follows the comment <!-- name: ... --> in the README."""
    text = (REPOSITORY / "README.md").read_text()
    block = re.search(rf"<!-- {name}: .*? -->\n```bash\n(.*?)```", text, re.DOTALL)
    assert block is not None, f"no block {name} in the README"
    return block.group(1).splitlines()
