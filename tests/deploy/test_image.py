"""Checks the Dockerfile and the image's constraints line by line. Soak tests run its steps without Docker."""

import json
import os
import platform
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.support.command_lines import parse_module
from tests.support.environments import PACKAGES, Environment, command_modules, copy_files, tracked_files
from tests.support.readme import REPOSITORY, text_of


def instructions(dockerfile: str = "deploy/Dockerfile") -> list[tuple[str, str]]:
    """[(instruction, arguments)] of a Dockerfile, with continued lines joined and without comments."""
    lines = [line for line in text_of(dockerfile).splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def of(kind: str) -> list[str]:
    return [arguments for instruction, arguments in instructions() if instruction == kind]


def pins(name: str) -> dict[str, str]:
    lines = [line for line in text_of(name).splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def project() -> dict:
    return tomllib.loads(text_of("pyproject.toml"))["project"]


def paths_of(copy: str) -> list[str]:
    """Sources and, last, target of a COPY."""
    return [word for word in shlex.split(copy) if not word.startswith("--")]


def is_sent_to_docker(path: str, ignore_file: str = ".dockerignore") -> bool:
    """Whether the ignore file lets a file into the build context: the last pattern for it or a parent folder decides."""
    parents = [path, *(str(parent) for parent in Path(path).parents)]
    is_sent = True
    for line in text_of(ignore_file).splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, parent) for parent in parents):
            is_sent = line.startswith("!")
    return is_sent


def constraint_parts() -> tuple[list[str], list[str]]:
    """The pins of the packages of torch's CUDA build, and the others."""
    cuda, others = text_of("constraints-gpu.txt").split("# The pins of constraints.txt:\n")
    return [line for line in cuda.splitlines() if not line.startswith("#")], others.splitlines()


def test_image_builds_on_rays_image_of_the_pinned_version():
    [base] = of("FROM")
    assert base == f"rayproject/ray:{pins('constraints.txt')['ray']}-py311-gpu"


def test_image_never_runs_as_root():
    users = of("USER")
    assert users
    assert all(user.isdigit() and int(user) > 0 for user in users)  # a number, because Kubernetes checks no names
    kinds = [kind for kind, _ in instructions()]
    assert kinds.index("USER") < kinds.index("RUN")
    assert "sudo" not in " ".join(of("RUN"))


def test_build_context_holds_what_is_copied_and_no_secrets():
    ignored = [line for line in text_of(".dockerignore").splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"
    sources = {source for copy in of("COPY") for source in paths_of(copy)[:-1]}
    assert sources == {line[1:] for line in ignored if line.startswith("!")}
    for source in sources:
        assert (REPOSITORY / source).exists(), source
    for name in (
        ".git/config", ".venv/bin/python", "build/demo/report.json", "tests/conftest.py", "docs/images/page.png",
        "mlruns/0/meta.yaml", "constraints.txt", "deploy/mlflow/.env", "pipelines/.env",
        "pipelines/__pycache__/train.cpython-311.pyc", "deploy/x.egg-info/PKG-INFO",
    ):  # fmt: skip
        assert not is_sent_to_docker(name), name
    for name in ("pyproject.toml", "pipelines/train/run.py", "deploy/mlflow/env.example", "deploy/web/index.html"):
        assert is_sent_to_docker(name), name


def test_the_endpoints_image_has_what_it_installs_and_serves_as_a_user():
    name = "deploy/endpoint.Dockerfile"
    steps = instructions(name)
    sources = {source for kind, rest in steps if kind == "COPY" for source in paths_of(rest)[:-1]}
    assert {"constraints.txt", "meanflow_core", "pipelines", "deploy"} < sources
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert is_sent_to_docker(source, f"{name}.dockerignore"), source
    assert not is_sent_to_docker(".git/config", f"{name}.dockerignore")
    kinds = [kind for kind, _ in steps]
    assert kinds[-3:] == ["USER", "EXPOSE", "ENTRYPOINT"]
    parse_module("deploy.serve", ["/generator", "--host", "0.0.0.0", "--api-keys", "alice", "0" * 64])


def test_dependencies_are_installed_before_the_code_from_the_image_constraints(capsys):
    steps = instructions()
    [install] = [i for i, (kind, rest) in enumerate(steps) if kind == "RUN" and "--requirement" in rest]
    [code] = [i for i, (kind, rest) in enumerate(steps) if kind == "COPY" and "meanflow_core" in rest]
    assert install < code
    assert "--constraint constraints-gpu.txt" in steps[install][1]
    [last] = [rest for kind, rest in steps[code:] if kind == "RUN"]
    assert "pip install --no-cache-dir --no-deps" in last
    words = shlex.split(steps[install][1])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        exec(words[words.index("-c") + 1], {})
    expected = project()["dependencies"] + project()["optional-dependencies"]["fid"]
    assert capsys.readouterr().out.splitlines() == expected


def test_image_differs_from_other_installs_only_in_cudas_packages():
    cuda, others = constraint_parts()
    assert others == [line for line in text_of("constraints.txt").splitlines() if line[0] != "#"]
    assert "nvidia-nccl-cu13" in {line.split("==")[0] for line in cuda}
    for line in cuda:
        assert re.fullmatch(r"(cuda-|nvidia-|triton)[a-z0-9-]*==[0-9.]+", line), line
    assert "neither installed nor run" in " ".join(text_of("constraints-gpu.txt").splitlines()[:5])


def test_every_direct_requirement_is_pinned_within_its_range():
    pinned = pins("constraints-gpu.txt")
    extras = project()["optional-dependencies"].values()
    for line in [*project()["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = Requirement(line)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{line} is pinned to {version}"
    [python] = re.findall(r"-py3(\d+)-", of("FROM")[0])
    assert SpecifierSet(project()["requires-python"]).contains(f"3.{python}")


def copy_as_docker_does(arguments: str, context: Path, workdir: Path) -> None:
    """COPY of files into a folder, or of one folder's content to another, without what .dockerignore excludes."""
    *sources, target = paths_of(arguments)
    for source in sources:
        files = [path for path in (context / source).rglob("*") if path.is_file()] or [context / source]
        for file in files:
            name = str(file.relative_to(context))
            if is_sent_to_docker(name):
                below = file.relative_to(context / source) if (context / source).is_dir() else Path(source)
                destination = workdir / target / below
                destination.parent.mkdir(parents=True, exist_ok=True)
                destination.write_bytes(file.read_bytes())


def test_copied_files_are_the_packages_files_in_git(tmp_path):
    context, workdir = tmp_path / "context", tmp_path / "workdir"
    copy_files(tracked_files(), context)
    for rubbish in ("deploy/mlflow/.env", "pipelines/__pycache__/train.pyc", "meanflow_ray.egg-info/PKG-INFO"):
        (context / rubbish).parent.mkdir(exist_ok=True)
        (context / rubbish).touch()
    for arguments in of("COPY"):
        copy_as_docker_does(arguments, context, workdir)
    expected = {"pyproject.toml", "constraints-gpu.txt", "LICENSE", "NOTICE", "README.md"}
    expected |= {name for name in tracked_files() if name.split("/")[0] in PACKAGES}
    assert {str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()} == expected


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Environment:
    """A new environment after the Dockerfile's steps.

    It differs from the image: this machine's Python instead of the base's, folders below a test folder, the current user,
    and the build of torch that pip finds. With a CPU build, the extra `fid` is removed again, because the published
    torchvision cannot be imported there.
    """
    folder = tmp_path_factory.mktemp("image")
    environment = Environment.create(folder)
    context, workdir = folder / "context", folder
    copy_files(tracked_files(), context)
    (folder / "tmp").mkdir()
    for kind, arguments in instructions():
        here = re.sub(r"(?<=\s)/(home|tmp)(?=/)", rf"{folder}/\1", f" {arguments}").strip()
        if kind == "WORKDIR":
            workdir = Path(here)
        elif kind == "COPY":
            copy_as_docker_does(arguments, context, workdir)
        elif kind == "RUN":
            environment.run("sh", "-c", here, cwd=workdir if workdir.is_dir() else folder, timeout_seconds=1800)
            if "--requirement" in here:
                cuda = environment.run("python", "-c", "import torch; print(torch.version.cuda)")
                if cuda.split()[-1] == "None":
                    environment.run("python", "-m", "pip", "uninstall", "--yes", "torchvision", "torch-fidelity")
        else:
            assert kind in ("FROM", "USER"), f"{kind} is not imitated here"
    return environment


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_every_command_runs_after_the_dockerfiles_steps(image):
    assert image.import_everything() == str(image.folder / "home" / "ray" / "meanflow-ray")
    assert not list((image.folder / "tmp").iterdir())
    image.run("python", "-m", "pip", "check")
    for module in command_modules():
        assert f"python -m {module} " in image.help_of(module)
    frozen = image.run("python", "-m", "pip", "freeze", "--exclude-editable").lower().replace("_", "-")
    found = dict(line.split("+")[0].split("==") for line in frozen.splitlines() if "==" in line)
    found |= {line.split(" @ ")[0]: re.findall(r"-([0-9.]+)", line)[0] for line in frozen.splitlines() if " @ " in line}
    pinned = pins("constraints-gpu.txt")
    assert {name: version for name, version in found.items() if pinned.get(name) != version} == {}


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    (sys.platform, platform.machine(), sys.version_info[:2]) != ("linux", "x86_64", (3, 11)),
    reason="resolves for the image's own Linux, processor and Python",
)
def test_image_pins_are_published_and_complete_for_torchs_cuda_build(tmp_path):
    environment = Environment.create(tmp_path)
    # Newer pips read a wheel's metadata alone: CUDA's wheels are gigabytes.
    environment.run("python", "-m", "pip", "install", "--quiet", "--upgrade", "pip>=25")
    constraints = str(REPOSITORY / "constraints-gpu.txt")

    def resolve(*arguments: str) -> dict[str, str]:
        # From the public index only: this machine's settings may lead to a CPU build of torch.
        environment.run(
            *("env", "--unset=PIP_FIND_LINKS", "--unset=PIP_EXTRA_INDEX_URL", "python", "-m", "pip", "install"),
            *("--dry-run", "--use-feature=fast-deps", "--ignore-installed", "--only-binary", ":all:", "--quiet"),
            *("--no-cache-dir", "--report", "report.json", *arguments),
            PIP_CONFIG_FILE=os.devnull,
        )
        installed = json.loads((environment.empty / "report.json").read_text())["install"]
        return {canonicalize_name(entry["metadata"]["name"]): entry["metadata"]["version"] for entry in installed}

    pinned = {canonicalize_name(name): version for name, version in pins("constraints-gpu.txt").items()}
    assert resolve("--no-deps", "--requirement", constraints) == pinned
    requirements = project()["dependencies"] + project()["optional-dependencies"]["fid"]
    needed = resolve("--constraint", constraints, *requirements)
    assert "nvidia-nccl-cu13" in needed
    unpinned = sorted(f"{name}=={version}" for name, version in needed.items() if name not in pinned)
    assert not unpinned, "add these lines to the first part of constraints-gpu.txt"
    unused = {line.split("==")[0] for line in constraint_parts()[0]} - set(needed)
    assert not unused, "no package requires these any more"
