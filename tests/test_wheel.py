"""The project as a wheel: what lies in it, and that it works where nothing else of the repository is."""

import ast
import email
import re
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.environments import PACKAGES, Environment, command_modules, copy_files, tracked_files
from tests.support.readme import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LEFT_OUT = {"deploy/Dockerfile": "what it copies is the repository, so that it builds nowhere else"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what git has, so that no build/ of this checkout gets into it, and none is left here."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_files(tracked_files(), folder / "source")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check",
         "--wheel-dir", str(folder), str(folder / "source")],
        check=True,
    )  # fmt: skip
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(contents) -> Message:
    [name] = [name for name in contents if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(contents[name])


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(contents):
    wanted = {name for name in tracked_files() if name.split("/")[0] in PACKAGES}
    assert set(LEFT_OUT) <= wanted
    held = {name for name in contents if ".dist-info/" not in name}
    assert held == wanted - set(LEFT_OUT)  # a new kind of data file wants a line under package-data
    for name in held:
        assert contents[name] == (REPOSITORY / name).read_bytes(), name


def test_the_wheel_fits_every_machine_with_a_python_of_the_stated_version(wheel, metadata):
    assert wheel.name == f"meanflow_ray-{PROJECT['version']}-py3-none-any.whl"
    assert metadata["Name"] == PROJECT["name"]
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert PROJECT["version"] in (REPOSITORY / "CHANGELOG.md").read_text()


def test_the_wheel_carries_its_licence_and_notices(contents, metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE", "NOTICE"]
    for name in ("LICENSE", "NOTICE"):
        [packed] = [path for path in contents if path.endswith(f".dist-info/licenses/{name}")]
        assert contents[packed] == (REPOSITORY / name).read_bytes()


def test_the_wheel_asks_for_what_the_project_asks_for(metadata):
    asked = {Requirement(line) for line in metadata.get_all("Requires-Dist")}
    wanted = {Requirement(line) for line in PROJECT["dependencies"]}
    for extra, lines in PROJECT["optional-dependencies"].items():
        wanted |= {Requirement(f'{line}; extra == "{extra}"') for line in lines}
    assert asked == wanted
    assert metadata.get_all("Provides-Extra") == list(PROJECT["optional-dependencies"])


def top_level_imports(name: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((REPOSITORY / name).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_every_package_that_the_code_imports_is_asked_for():
    asked = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    # fastapi, pydantic, starlette and aiohttp are the versions that Serve and the job client are made for.
    asked |= {canonicalize_name(Requirement(line).name) for line in requires("ray") or [] if 'extra == "serve"' in line}
    asked |= {"requests"}  # Ray's own
    only_with_an_extra = {"torch_fidelity"}
    providers = packages_distributions()
    for name in tracked_files():
        if name.split("/")[0] in PACKAGES and name.endswith(".py"):
            foreign = top_level_imports(name) - set(sys.stdlib_module_names) - set(PACKAGES) - only_with_an_extra
            for imported in foreign:
                given_by = {canonicalize_name(provider) for provider in providers[imported]}
                assert given_by & asked, f"{name} imports {imported}, which nothing in pyproject.toml brings"


def test_commands_are_found_by_looking():
    found = command_modules()
    assert {"pipelines.train", "pipelines.demo", "pipelines.demo.images", "deploy.jobs", "deploy.keys"} <= set(found)
    assert "pipelines.evaluate.judge" not in found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    """A new environment that the wheel is installed into, as a user would: nothing of this repository on its paths."""
    environment = Environment.create(tmp_path_factory.mktemp("installed"))
    constraints = str(REPOSITORY / "constraints.txt")
    pip = ("python", "-m", "pip", "install", "--progress-bar", "off", "--quiet")
    environment.run(*pip, str(wheel), patience_seconds=1800, PIP_CONSTRAINT=constraints)
    return environment


@pytest.mark.soak
@pytest.mark.timeout(2400)  # the installation, which comes first
@pytest.mark.parametrize("module", command_modules())
def test_every_command_of_the_installed_wheel_tells_its_usage(installed, module):
    usage = re.sub(r"\x1b\[[\d;]*m", "", installed.help_of(module)).strip()
    assert usage.startswith(f"usage: python -m {module} ")


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_the_installed_wheel_imports_and_opens_all_that_it_brings(installed):
    installed.run("python", "-m", "pip", "check")
    assert installed.uses_everything().startswith(str(installed.folder / "venv"))
    assert "--num-steps" in installed.run("python", "-m", "pipelines.train", "demo", "--help")


@pytest.mark.soak
@pytest.mark.cluster
@pytest.mark.timeout(3600)
def test_the_installed_wheel_goes_from_images_to_a_served_model_in_an_empty_folder(installed):
    before = {path.name for path in Path(installed.python).parents[1].glob("lib/python*/site-packages/*")}
    installed.run(
        "python", "-m", "pipelines.demo", "--preset", "debug", "--num-train", "200", "--num-val", "60", "--num-samples", "40",
        patience_seconds=1200,
    )  # fmt: skip
    made = installed.empty / "build" / "demo"
    for name in ("latents/manifest.json", "runs/demo/generator/model_index.json", "report.json", "served.png"):
        assert (made / name).is_file(), name
    assert {path.name for path in installed.empty.iterdir()} == {"build"}
    after = {path.name for path in Path(installed.python).parents[1].glob("lib/python*/site-packages/*")}
    assert after == before  # nothing was written among the packages

    latents, runs = str(made / "latents"), str(made / "runs")
    installed.run("python", "-m", "pipelines.check", "--data", latents, "--picture", "check.png")
    plan = installed.run(
        "python",
        "-m",
        "pipelines.train",
        "xl2",
        "--data",
        latents,
        "--storage",
        runs,
        "--run-name",
        "plan",
        "--dry-run",
    )
    assert "parameters" in plan
