"""The image's Dockerfile and its constraints: read line by line, and (long) done without Docker. Nothing here builds it."""

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

from tests.support.environments import PACKAGES, Environment, command_modules, copy_files, tracked_files

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
        "tests/pipelines/demo/test_demo_run.py",
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
    for sent in ("pyproject.toml", "pipelines/train/run.py", "deploy/mlflow/env.example", "deploy/web/index.html"):
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


def parts_of_the_image_constraints() -> tuple[list[str], list[str]]:
    """The pins of what torch's CUDA build brings, and the others."""
    cuda, others = (REPOSITORY / "constraints-gpu.txt").read_text().split("# The pins of constraints.txt:\n")
    return [line for line in cuda.splitlines() if not line.startswith("#")], others.splitlines()


def test_the_image_has_the_versions_of_every_other_install_but_for_cuda():
    cuda, others = parts_of_the_image_constraints()
    assert others == [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    assert "nvidia-nccl-cu13" in {line.split("==")[0] for line in cuda}
    for line in cuda:
        assert re.fullmatch(r"(cuda-|nvidia-|triton)[a-z0-9-]*==[0-9.]+", line), line
    assert "neither installed nor run" in " ".join((REPOSITORY / "constraints-gpu.txt").read_text().splitlines()[:5])


def test_every_direct_requirement_is_pinned_within_its_range():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = pins("constraints-gpu.txt")
    for line in [*project["dependencies"], *(line for extra in extras.values() for line in extra)]:
        requirement = Requirement(line)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{line} is pinned to {version}"
    [python] = re.findall(r"-py3(\d+)-", of("FROM")[0])
    assert SpecifierSet(project["requires-python"]).contains(f"3.{python}")


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def copy_as_docker_does(instruction: str, context: Path, workdir: Path) -> None:
    """COPY of files into a folder, or of one folder's content to another, without what .dockerignore keeps back."""
    *sources, target = [word for word in shlex.split(instruction) if not word.startswith("--")]
    for source in sources:
        if (context / source).is_dir():
            [name] = sources
            for file in (
                name for name in files_below(context) if name.startswith(f"{source}/") and reaches_docker(name)
            ):
                destination = workdir / target / Path(file).relative_to(name)
                destination.parent.mkdir(parents=True, exist_ok=True)
                destination.write_bytes((context / file).read_bytes())
        elif reaches_docker(source):
            (workdir / target / source).write_bytes((context / source).read_bytes())


def test_copying_takes_the_packages_whole_and_nothing_that_git_has_not(tmp_path):
    context, workdir = tmp_path / "context", tmp_path / "workdir"
    copy_files(tracked_files(), context)
    for rubbish in ("deploy/mlflow/.env", "pipelines/__pycache__/train.pyc", "meanflow_ray.egg-info/PKG-INFO"):
        (context / rubbish).parent.mkdir(exist_ok=True)
        (context / rubbish).touch()
    workdir.mkdir()
    for rest in of("COPY"):
        copy_as_docker_does(rest, context, workdir)
    top = {"pyproject.toml", "constraints-gpu.txt", "LICENSE", "NOTICE", "README.md"}
    assert files_below(workdir) == top | {name for name in tracked_files() if name.split("/")[0] in PACKAGES}


def leave_out_what_wants_cuda(environment: Environment) -> None:
    if environment.run("python", "-c", "import torch; print(torch.version.cuda)").split()[-1] == "None":
        environment.run("python", "-m", "pip", "uninstall", "--yes", "torchvision", "torch-fidelity")


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Environment:
    """The Dockerfile's steps, done in a new environment.

    It stands for the Python of the base image, whose Ray is thus installed, too; the image's folders lie below a folder of
    the test; who runs it is not changed; and torch is the build that pip takes here. Beside a CPU build the extra `fid` is
    taken out again, because the public torchvision does not import there.
    """
    folder = tmp_path_factory.mktemp("image")
    environment = Environment.create(folder)
    context, workdir = folder / "context", folder
    copy_files(tracked_files(), context)
    (folder / "tmp").mkdir()
    for kind, rest in instructions():
        here = re.sub(r"(?<=\s)/(home|tmp)(?=/)", rf"{folder}/\1", f" {rest}").strip()
        if kind == "WORKDIR":
            workdir = Path(here)
        elif kind == "COPY":
            copy_as_docker_does(rest, context, workdir)
        elif kind == "RUN":
            environment.run("sh", "-c", here, cwd=workdir if workdir.is_dir() else folder, patience_seconds=1800)
            if "--requirement" in here:
                leave_out_what_wants_cuda(environment)
        else:
            assert kind in ("FROM", "USER"), f"{kind} is not acted on here"
    return environment


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_the_dockerfiles_steps_make_an_environment_in_which_every_command_runs(image):
    workdir = image.folder / "home" / "ray" / "meanflow-ray"
    assert image.uses_everything() == str(workdir)
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
def test_the_images_pins_are_to_be_had_and_fit_torchs_cuda_build(tmp_path):
    environment = Environment.create(tmp_path)
    # A pip that asks for nothing but a wheel's metadata: CUDA's wheels are gigabytes.
    environment.run("python", "-m", "pip", "install", "--quiet", "--upgrade", "pip>=25")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    constraints = str(REPOSITORY / "constraints-gpu.txt")

    def resolve(*arguments: str) -> dict[str, str]:
        # The public index alone: this machine's settings may lead to a CPU build of torch.
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
    needed = resolve("--constraint", constraints, *project["dependencies"], *project["optional-dependencies"]["fid"])
    assert "nvidia-nccl-cu13" in needed
    unpinned = sorted(f"{name}=={version}" for name, version in needed.items() if name not in pinned)
    assert not unpinned, "these lines belong into the first part of constraints-gpu.txt"
    cuda, _ = parts_of_the_image_constraints()
    unused = {line.split("==")[0] for line in cuda} - set(needed)
    assert not unused, "nothing brings these any more"
