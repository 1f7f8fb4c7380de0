"""The image's Dockerfile and its constraints, read line by line: nothing here builds it."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """[(instruction, rest)] of the Dockerfile, lines that go on joined, comments left out."""
    text = (REPOSITORY / "deploy" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def of(kind: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == kind]


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (REPOSITORY / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def copied() -> list[str]:
    return [
        word for rest in of("COPY") for word in [part for part in shlex.split(rest) if not part.startswith("--")][:-1]
    ]


def test_the_base_is_rays_own_image_of_the_pinned_version():
    [base] = of("FROM")
    assert base == f"rayproject/ray:{pins('constraints.txt')['ray']}-py311-gpu"


def test_nothing_in_it_runs_as_root():
    users = of("USER")
    assert users
    assert all(user.isdigit() and int(user) > 0 for user in users)  # by number: Kubernetes checks no names
    kinds = [kind for kind, _ in instructions()]
    assert kinds.index("USER") < kinds.index("RUN")
    assert "sudo" not in " ".join(of("RUN"))


def test_everything_that_is_copied_exists_and_passes_the_ignore_file():
    ignored = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"
    let_through = {line[1:] for line in ignored if line.startswith("!")}
    assert set(copied()) == let_through
    for source in copied():
        assert (REPOSITORY / source).exists(), source


def reaches_docker(path: str) -> bool:
    """Whether `docker build` is sent a file: the last pattern of .dockerignore that fits it or a folder above it says."""
    parents = [path, *(str(parent) for parent in Path(path).parents)]
    sent = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, parent) for parent in parents):
            sent = line.startswith("!")
    return sent


def test_no_secrets_and_no_rubbish_get_into_the_context():
    for kept_out in (
        ".git/config",
        ".venv/bin/python",
        "build/demo/report.json",
        "tests/test_demo.py",
        "docs/page.png",
        "mlruns/0/meta.yaml",
        "constraints.txt",
        "deploy/mlflow/.env",  # the passwords of whoever runs that server
        "pipelines/.env",
        "pipelines/__pycache__/train.cpython-311.pyc",
        "pipelines/demo/__pycache__/images.cpython-311.pyc",
        "deploy/x.egg-info/PKG-INFO",
    ):
        assert not reaches_docker(kept_out), kept_out
    for sent in ("pyproject.toml", "pipelines/train.py", "deploy/mlflow/env.example", "deploy/web/index.html"):
        assert reaches_docker(sent), sent


def test_dependencies_come_before_code_and_from_the_constraints_of_the_image():
    steps = instructions()
    install = next(i for i, (kind, rest) in enumerate(steps) if kind == "RUN" and "--requirement" in rest)
    code = next(i for i, (kind, rest) in enumerate(steps) if kind == "COPY" and "meanflow_core" in rest)
    assert install < code
    assert "--constraint constraints-gpu.txt" in steps[install][1]
    [project] = [rest for kind, rest in steps[code:] if kind == "RUN"]
    assert "pip install --no-cache-dir --no-deps" in project  # all of them are there by then


def test_requirements_that_the_image_installs_are_the_projects(capsys):
    [step] = [rest for rest in of("RUN") if "--requirement" in rest]
    words = shlex.split(step)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        exec(words[words.index("-c") + 1], {})
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out.splitlines() == project["dependencies"] + project["optional-dependencies"]["fid"]


def test_the_image_has_the_versions_of_every_other_install():
    assert pins("constraints-gpu.txt") == pins("constraints.txt")
    header = (REPOSITORY / "constraints-gpu.txt").read_text().split("\n", 6)
    assert "neither resolved afresh nor run" in " ".join(header)
