"""Checks that the commands, links, files and options in README.md, docs/*.md and the other pages exist and parse."""

import re
import tomllib

import click
import pytest
import yaml
from mlflow.cli import cli as mlflow_command_line
from ray.scripts.scripts import cli as ray_command_line
from ray.serve.scripts import cli as serve_command_line
from sqlalchemy.engine import make_url

from meanflow_core import checkpoint
from meanflow_core.formats import GENERATOR_FORMAT_VERSION
from pipelines.latents.manifest import SCHEMA_VERSION
from tests.support.command_lines import TOOLS, parse_command, parse_module
from tests.support.readme import REPOSITORY, commands, text_of

GENERATED = {f"docs/reference/{name}.md" for name in ("commands", "presets", "endpoint")}  # by `make docs`
DOCS = sorted(
    {str(path.relative_to(REPOSITORY)) for kind in ("md", "ipynb") for path in (REPOSITORY / "docs").rglob(f"*.{kind}")}
    - GENERATED
)
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", *DOCS)
KUBERNETES = "docs/how-to/kubernetes.md"  # tests/test_docs_kubernetes.py checks the commands of this page
COMMAND_PAGES = (
    "CONTRIBUTING.md",
    "README.md",
    "docs/gallery.md",
    "docs/how-to/refine.md",
    "docs/how-to/serve.md",
    "docs/how-to/aws.md",
    "docs/how-to/convert.md",
    "docs/how-to/encode.md",
    "docs/how-to/evaluate.md",
    "docs/how-to/existing-cluster.md",
    "docs/how-to/keep-serving.md",
    "docs/how-to/train.md",
    "docs/reference/files.md",
    "docs/tutorials/first-images.ipynb",
    "docs/tutorials/own-images.ipynb",
    "docs/how-to/upgrade.md",
)


def blocks(page: str) -> list[tuple[str, str]]:
    """(kind, text) of a page's fenced blocks."""
    parts = re.split(r"^```", text_of(page), flags=re.MULTILINE)
    assert len(parts) % 2, f"{page}: a block without an end"
    return [tuple(block.split("\n", 1)) for block in parts[1::2]]


@pytest.mark.parametrize("page", COMMAND_PAGES)
def test_every_command_of_a_page_parses(page):
    lines = [line for kind, block in blocks(page) if kind == "bash" for line in block.splitlines() if line]
    assert len(lines) >= {
        "README.md": 14,
        "docs/reference/files.md": 7,
        "CONTRIBUTING.md": 4,
        "docs/how-to/convert.md": 3,
        "docs/how-to/evaluate.md": 7,
        "docs/how-to/existing-cluster.md": 6,
        "docs/how-to/keep-serving.md": 4,
        "docs/how-to/train.md": 5,
        "docs/tutorials/first-images.ipynb": 5,
        "docs/tutorials/own-images.ipynb": 6,
        "docs/gallery.md": 4,
        "docs/how-to/refine.md": 4,
        "docs/how-to/serve.md": 9,
    }.get(page, 9)
    for line in lines:
        if line.startswith("{"):  # a shell group of sed and grep: only its files are checked
            named = set(re.findall(r"(?<![/\w])constraints[\w-]*\.txt", line))
            assert named == {"constraints.txt", "constraints-gpu.txt"}
            continue
        try:
            parse_command(line)
        except SystemExit as error:
            raise AssertionError(f"does not parse: {line}") from error


@pytest.mark.parametrize(
    "line",
    [
        "python -m pipelines.encode --image x --output y --vae z",
        "python -m pipelines.train xl3 --data d --storage s --run-name r",
        "deploy/jobs/trian.sh",
        "deploy/jobs/train.sh --num-step 10",
        "SUBMISSION=train-xl2-2 deploy/jobs/train.sh",
        "ray job submit --workin-dir . -- python -m pipelines.check --data d",
        "ray job submit --runtime-env deploy/jobs/runtime.yaml -- python -m pipelines.check --data d",
        "ray job submit -- python -m pipelines.check --dta d",
        "ray job follow train-xl2",
        "ray up ray_clusters.yaml",
        "ray drain-node --node-id N --reason NONE --reason-message m",
        "serve deploy deploy/server.yaml",
        "serve run deploy.app:build_app modell=x",
        "python -m deploy.serve x --prt 8000",
        "mlflow server --backend-uri x",
        "make everything",
        """curl x -d '{"klass": "a"}'""",
        "curl localhost:5000/healthy",
        "docker build --file Dockerfile .",
        "docker push REGISTRY/meanflow-ray:9.9.9",
        "docker run --rm --gpu all REGISTRY/meanflow-ray:0.1.0",
        "aws ec2 create-security-groups --group-name g --description d",
        "aws ec2 create-security-group --group-nam g --description d",
        "aws ec2 describe-subnets --filters Nam=availability-zone,Values=a",
        "aws s3 cp a b",
        "G=$(aws ec2 create-security-grup --group-name g --description d)",
        "aws ecr get-login-password | docker login --username AWS REGISTRY",
        "export RAY_API_SERVER_ADRESS=x",
        "pip install mlflow==3.17.1",
        "rm -rf /",
    ],
)
def test_misspelt_command_does_not_parse(line, capsys):
    with pytest.raises((Exception, SystemExit)):
        parse_command(line)


@pytest.mark.parametrize("page", PAGES)
def test_every_bash_block_is_marked_with_the_test_that_reads_it(page):
    for kind, block in blocks(page):
        kinds = {"bash", "python", "html", "bibtex", "ini", "dockerfile", "yaml", "", "{toctree}", "{eval-rst}"}
        assert kind in kinds, (page, kind)  # tests/deploy/api/test_page.py runs the html
        if kind == "python":
            compile(block, page, "exec")
        if kind == "yaml":
            yaml.safe_load(block)
        # A block without a kind holds no commands.
        assert kind == "bash" or not any(line.split(" ")[0] in TOOLS for line in block.splitlines() if line), block
    if page == KUBERNETES:
        return
    marked = re.findall(r"<!-- ([\w-]+): (?:run|parsed) by (tests/[\w.]+) -->\n```bash\n", text_of(page))
    assert len(marked) == sum(kind == "bash" for kind, _ in blocks(page))
    for name, reader in marked:
        # This file reads every block of COMMAND_PAGES. Other test files must contain the names of the blocks they read.
        assert reader == "tests/test_docs.py" or re.search(rf'["\']{name}["\']', text_of(reader)), (name, reader)
    assert page in COMMAND_PAGES or not any(reader == "tests/test_docs.py" for _, reader in marked)


def test_database_driver_of_the_documented_mlflow_server_is_installed():
    [line] = [line for line in commands("runbook", "docs/how-to/aws.md") if line.startswith("mlflow server")]
    [address] = re.findall(r"--backend-store-uri (\S+)", line)
    driver = make_url(address).get_dialect().driver
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    assert f"{driver}-binary" in extras["server"]


def exists(words: list[str]) -> bool:
    """Whether a command within a sentence exists; its required arguments may be left out."""
    if words[:2] == ["python", "-m"]:
        path = REPOSITORY / words[2].replace(".", "/")
        return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    if words[0] == "python":
        return (REPOSITORY / words[1]).is_file()
    command: click.Command = {
        "ray": ray_command_line,
        "serve": serve_command_line,
        "mlflow": mlflow_command_line,
    }[words[0]]
    rest = words[1:]
    while isinstance(command, click.Group) and rest:
        _, command, rest = command.resolve_command(click.Context(command), rest)
    options = {option for parameter in command.params for option in parameter.opts}
    return {word.split("=")[0] for word in rest if word.startswith("--")} <= options


def test_commands_within_sentences_exist():
    seen = 0
    for page in set(PAGES) - {"CHANGELOG.md"}:  # which also names removed commands
        prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`]+)`", prose):
            words = code.replace("\n", " ").split()
            if words[-1].endswith(".X"):  # any module
                continue
            if len(words) > 1 and words[0] in ("python", "ray", "serve", "mlflow"):
                assert exists(words), (page, code)
                seen += 1
            elif len(words) > 1 and words[0] == "make":
                parse_command(" ".join(words))
    assert seen >= 20


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def test_versions_of_formats_are_those_of_the_code():
    text = text_of("docs/how-to/upgrade.md")
    versions = dict(re.findall(r"^\| (latent dataset|checkpoint|generator) \|.*\| (\d+) \|$", text, re.MULTILINE))
    assert versions == {
        "latent dataset": str(SCHEMA_VERSION),
        "checkpoint": str(checkpoint.FORMAT_VERSION),
        "generator": str(GENERATOR_FORMAT_VERSION),
    }


def test_files_that_pages_name_exist():
    named = set()
    for page in (*PAGES, "NOTICE"):
        text = text_of(page)
        named |= set(re.findall(r"`?((?:meanflow_core|pipelines|deploy|tests|docs)/[\w./-]+\.\w+)", text))
        if page not in (KUBERNETES, "docs/explanation/architecture.md"):  # these two name files without their folders
            named |= set(re.findall(r"`([A-Z]\w+\.md|[\w-]+\.(?:txt|yaml|toml))`", text)) - {
                "table.md",
                "class_names.txt",
                "LOC_synset_mapping.txt",
            }
    assert len(named) >= 40
    assert {name for name in named if not (REPOSITORY / name).exists()} == {"deploy/mlflow/.env"}


def test_training_options_that_the_runbook_names_exist():
    required = ["xl2", "--data", "d", "--storage", "s", "--run-name", "r"]
    options = re.findall(
        r"`(--(?:rows|activation|parallelism|skip|keep|num-steps|device|precision|loss)[^`=]*)`",
        text_of("docs/how-to/aws.md"),
    )
    assert len(options) >= 5
    files = ("pipelines/train/job.py", "pipelines/training/job.py", "meanflow_core/config/training.py")
    source = "".join(text_of(file) for file in files)
    for option in options:
        words = option.split()
        if len(words) > 1 or option == "--activation-checkpointing":
            parse_module("pipelines.train", [*required, *words])
        else:  # the page gives no value to parse, so only the option's field is looked up
            assert words[0].removeprefix("--").replace("-", "_") in source, option
