"""Writes a constraints file: exact public versions of the packages that the project and its extras install."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Resolves the dependencies and writes their versions to the file named on the command line."""
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(report), ".[dev,browser,docs,fid,server]"], check=True)
        resolved = json.loads(report.read_text())["install"]
    versions = {entry["metadata"]["name"].lower().replace("_", "-"): entry["metadata"]["version"] for entry in resolved}
    versions.pop("meanflow-ray")
    lines = [f"{name}=={version.split('+')[0]}" for name, version in sorted(versions.items())]
    target.write_text("# Exact versions, used by every install; `make lock` renews them.\n" + "\n".join(lines) + "\n")
    print(f"{target}: {len(lines)} packages")


if __name__ == "__main__":
    main()
