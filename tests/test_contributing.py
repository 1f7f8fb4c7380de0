"""Checks the files for contributors: the GitHub workflow, issue forms, pre-commit hooks, and the citation."""

import re
import tomllib

import pytest
import yaml

from tests.support.command_lines import parse_command
from tests.support.readme import REPOSITORY, text_of

PROJECT = tomllib.loads(text_of("pyproject.toml"))["project"]


def test_the_workflow_runs_tests_and_docs_and_builds_a_release_from_a_tag():
    workflow = yaml.safe_load(text_of(".github/workflows/ci.yml"))
    lines = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in workflow["jobs"].items()}
    assert lines["test"] == ["make test"]
    assert lines["docs"] == ["make docs"]
    for line in (*lines["test"], *lines["docs"]):
        parse_command(line)
    assert workflow["jobs"]["release"]["needs"] == ["test", "docs"]
    assert any(line.startswith("docker build --file deploy/Dockerfile") for line in lines["release"])
    assert {"push", "pull_request"} <= set(workflow[True])  # YAML reads the key `on` as true


def test_pre_commit_runs_the_linters_of_make_lint():
    [repository] = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    hooks = {hook["entry"].removeprefix(".venv/bin/").replace(" --check", "") for hook in repository["hooks"]}
    recipe = re.search(r"^lint:.*?\n\n", text_of("Makefile"), re.MULTILINE | re.DOTALL)[0]
    linters = {line.replace(" --check", "").removesuffix(" .") for line in re.findall(r"\$\(BIN\)/(.*)", recipe)}
    assert hooks == linters


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_ask_required_questions(name):
    form = yaml.safe_load(text_of(f".github/ISSUE_TEMPLATE/{name}.yml"))
    assert {"name", "description", "body"} <= set(form)
    assert all(field["validations"]["required"] and field["attributes"]["label"] for field in form["body"])


def test_the_citation_names_this_version_and_licence():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2505.13447"


def test_packages_declare_their_types():
    assert all((REPOSITORY / package / "py.typed").is_file() for package in ("meanflow_core", "pipelines", "deploy"))
