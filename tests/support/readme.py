"""The text and the commands of README.md and docs/*.md, for the tests that run or parse them."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def text_of(name: str) -> str:
    """The text of a file of the repository."""
    return (REPOSITORY / name).read_text()


def commands(name: str, page: str = "README.md") -> list[str]:
    """The lines of the code blocks that follow the comment <!-- name: ... --> on a page."""
    blocks = re.findall(rf"<!-- {name}: .*? -->\n```bash\n(.*?)```", text_of(page), re.DOTALL)
    assert blocks, f"no block {name} in {page}"
    return [line for block in blocks for line in block.splitlines() if line]
