"""Commands and figures of docs/*.md: every command is understood by what would run it, every figure is computed again."""

import argparse
import json
import re
import shlex
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import pytest
import tyro
import yaml
from mlflow.cli import cli as mlflow_command_line
from ray.scripts.scripts import cli as ray_command_line
from ray.serve.scripts import cli as serve_command_line
from sqlalchemy.engine import make_url

from deploy.api.schema import GenerateRequest, ImagesRequest
from deploy.jobs.__main__ import parse_arguments as parse_jobs
from deploy.jobs.job_file import read_job_file
from deploy.settings import Arguments
from meanflow_core.presets import PRESETS
from pipelines.check import CheckJob
from pipelines.convert.job import ConvertJob
from pipelines.demo.images import DrawImages
from pipelines.encode.job import EncodeJob
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.reference import ReferenceJob
from pipelines.evaluate.side_by_side import SideBySideJob
from pipelines.latents.cache import CacheJob
from pipelines.plan.__main__ import parse_arguments as parse_plan
from pipelines.plan.cost import checkpoint_bytes, forward_flops, memory_estimate, num_parameters, step_flops
from pipelines.train.run import parse_arguments as parse_training
from tests.support.aws import understand_aws

REPOSITORY = Path(__file__).parents[1]
# "start" is the first block of the README, read with all others of it.
DOCUMENTS = {"runbook": "docs/runbook.md", "own-images": "docs/own-images.md", "upgrading": "docs/upgrading.md"}
SIZES = {"sample_size": 32, "in_channels": 4, "num_classes": 1000}


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text()


PAGES = (
    "README.md",
    "SECURITY.md",
    "CHANGELOG.md",
    *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")),
)


def commands(name: str) -> list[str]:
    """All lines of a document's marked blocks."""
    found = re.findall(
        rf"<!-- {name}: parsed by tests/test_docs.py -->\n```bash\n(.*?)```", text_of(DOCUMENTS[name]), re.DOTALL
    )
    return [line for block in found for line in block.splitlines() if line.strip()]


def of_class(kind: type) -> Callable[[list[str]], object]:
    return lambda words: tyro.cli(kind, args=words)


def no_options(module: str) -> Callable[[list[str]], object]:
    def parse(words: list[str]) -> object:
        assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file()
        parser = argparse.ArgumentParser()
        parser.add_argument("argument")
        return parser.parse_args(words)

    return parse


MODULES: dict[str, Callable[[list[str]], object]] = {
    "pipelines.check": of_class(CheckJob),
    "pipelines.encode": of_class(EncodeJob),
    "pipelines.evaluate": of_class(EvaluateJob),
    "pipelines.convert": of_class(ConvertJob),
    "pipelines.demo.images": of_class(DrawImages),
    "pipelines.latent_cache": of_class(CacheJob),
    "pipelines.side_by_side": of_class(SideBySideJob),
    "pipelines.reference": of_class(ReferenceJob),
    "pipelines.train": parse_training,
    "pipelines.plan": parse_plan,
    "deploy.jobs": parse_jobs,
    "deploy.models": no_options("deploy.models"),
    "deploy.keys": no_options("deploy.keys"),
}


def understand_python(words: list[str]) -> object:
    if words[0] == "-m":
        parsed = MODULES[words[1]](words[2:])
        if words[1] == "deploy.jobs" and parsed.command == "submit":
            read_job_file(REPOSITORY / parsed.file)
        return parsed
    assert all((REPOSITORY / word).is_file() for word in words), words
    return words


def understand_click(group: click.Group, words: list[str]) -> click.Context:
    """The command that Ray's, Serve's or MLflow's command line would run, with its parameters."""
    command: click.Command = group
    name = None
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(click.Context(command), words)
    return command.make_context(name, list(words))


def understand_ray(words: list[str]) -> None:
    context = understand_click(ray_command_line, words)
    for word in words:
        if word.endswith(".yaml"):
            assert (REPOSITORY / word).is_file(), word
    if words[:2] == ["job", "submit"]:
        parameters = context.params
        for name in ("runtime_env_json", "entrypoint_label_selector"):
            assert parameters[name] is None or isinstance(json.loads(parameters[name]), dict)
        entrypoint = list(parameters["entrypoint"])
        assert entrypoint[0] == "python"
        understand_python(entrypoint[1:])
    if words[0] == "exec":
        understand(context.params["cmd"])


def understand_serve(words: list[str]) -> None:
    context = understand_click(serve_command_line, words)
    if words[0] == "run":
        arguments = dict(word.split("=", 1) for word in context.params["arguments"])
        Arguments.model_validate(arguments)
    for word in words:
        if word.endswith(".yaml"):
            assert (REPOSITORY / word).is_file(), word


def understand_curl(words: list[str]) -> None:
    [address] = [word for word in words if re.match(r"(https?://)?[\w.-]+:\d+/", word)]
    path = "/" + address.split("?")[0].removeprefix("http://").split("/", 1)[1]
    if "-d" in words:
        schemas = {"/generate": GenerateRequest, "/v1/images/generations": ImagesRequest}
        schemas[path].model_validate(json.loads(words[words.index("-d") + 1]))
    else:
        assert path in ("/health", "/readyz", "/classes"), path


def understand_docker(words: list[str]) -> None:
    image = "REGISTRY/meanflow-ray:" + tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    if words[0] == "build":
        assert (REPOSITORY / words[words.index("--file") + 1]).is_file()
        assert words[words.index("--tag") + 1] == image
        assert words[-1] == "."
    elif words[0] == "push":
        assert words[1:] == [image]
    elif words[0] == "login":
        assert words[1:] == ["--username", "AWS", "--password-stdin", image.split("/")[0]]
    else:
        assert words[0] == "run"
        parser = argparse.ArgumentParser(allow_abbrev=False)
        for switch in ("--rm", "--detach"):
            parser.add_argument(switch, action="store_true")
        for option in ("--gpus", "--restart", "--name", "--publish", "--volume"):
            parser.add_argument(option)
        parser.add_argument("--env", action="append")
        parser.add_argument("image", choices=[image, "postgres:17"])
        parser.add_argument("command", nargs=argparse.REMAINDER)
        command = parser.parse_args(words[1:]).command
        if command[:2] == ["python", "-c"]:
            compile(command[2], "-c", "exec")
        else:
            assert command in ([], ["pip", "freeze"])


def understand_make(words: list[str]) -> None:
    for target in words:
        assert re.search(rf"^{target}:", text_of("Makefile"), re.MULTILINE), target


def understand_pip(words: list[str]) -> None:
    assert words[0] == "install"
    if "--constraint" in words:
        assert (REPOSITORY / words[words.index("--constraint") + 1]).is_file()
    for word in words[1:]:
        if "==" in word:
            assert word in text_of("constraints.txt").splitlines()
        elif word.startswith(".["):
            project = tomllib.loads(text_of("pyproject.toml"))["project"]
            assert word[2:-1] in project["optional-dependencies"]


def understand_ssh(words: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("-i", required=True)
    parser.add_argument("-N", action="store_true", required=True)
    parser.add_argument("-L", type=re.compile(r"\d+:localhost:\d+").fullmatch, required=True)
    parser.add_argument("host", type=re.compile(r"ubuntu@.+").fullmatch)
    assert None not in vars(parser.parse_args(words)).values()


def understand_export(words: list[str]) -> None:
    """Variables that Ray, MLflow, AWS's tools or PostgreSQL read, or a job's file hands on."""
    known = {"RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "AWS_DEFAULT_REGION", "PGPASSWORD"}
    for path in (REPOSITORY / "deploy" / "jobs").glob("*.yaml"):
        known |= set(read_job_file(path).env_from)
    for word in words:
        name, value = word.split("=", 1)
        assert name in known, name
        assert value


def understand_openssl(words: list[str]) -> None:
    assert words == ["rand", "-hex", "24"]


def understand_source(words: list[str]) -> None:
    assert words == [".venv/bin/activate"]


# What earlier lines of the runbook keep in the shell.
IDS = {"$GROUP": "sg-0123456789abcdef0", "$SUBNET": "subnet-0123456789abcdef0", "$FILES": "fs-0123456789abcdef0"}

TOOLS: dict[str, Callable[[list[str]], object]] = {
    "python": understand_python,
    "ray": understand_ray,
    "serve": understand_serve,
    "mlflow": lambda words: understand_click(mlflow_command_line, words),
    "curl": understand_curl,
    "docker": understand_docker,
    "make": understand_make,
    "pip": understand_pip,
    "aws": lambda words: understand_aws([IDS.get(word, word) for word in words]),
    "export": understand_export,
    "openssl": understand_openssl,
    "source": understand_source,
    "ssh": understand_ssh,
}


def understand(line: str) -> object:
    """What a line would run, by its real parser. Raises whatever that raises, or KeyError for an unknown command."""
    if line.startswith("export ") and "$(" in line:
        name, inner = re.fullmatch(r"export (\w+)=\$\((.*)\)", line).groups()
        understand(f"export {name}=x")
        return understand(inner)
    if assigned := re.fullmatch(r"[A-Z]+=\$\((.*)\)", line):
        return understand(assigned.group(1))
    words = shlex.split(line, comments=True)
    if "|" in words:
        understand(shlex.join(words[: words.index("|")]))
        words = words[words.index("|") + 1 :]
    return TOOLS[words[0]](words[1:])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_is_understood_by_what_would_run_it(name):
    lines = commands(name)
    assert len(lines) >= 9
    for line in lines:
        if line.startswith("{"):  # the shell's own grouping: its files are looked at
            assert set(re.findall(r"(?<![/\w])constraints[\w-]*\.txt", line)) == {
                "constraints.txt",
                "constraints-gpu.txt",
            }
            continue
        try:
            understand(line)
        except SystemExit as error:
            raise AssertionError(f"not understood: {line}") from error


def test_the_servers_database_is_reached_by_the_driver_that_is_installed():
    (line,) = [line for line in commands("runbook") if line.startswith("mlflow server")]
    (address,) = re.findall(r"--backend-store-uri (\S+)", line)
    driver = make_url(address).get_dialect().driver
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    assert f"{driver}-binary" in extras["server"]


@pytest.mark.parametrize(
    "line",
    [
        "python -m pipelines.encode --image x --output y --vae z",
        "python -m pipelines.train xl3 --data d --storage s --run-name r",
        "python -m deploy.jobs submit deploy/jobs/trian.yaml",
        "python -m deploy.jobs sbumit deploy/jobs/train.yaml",
        "ray job submit --workin-dir . -- python -m pipelines.check --data d",
        "ray job submit -- python -m pipelines.check --dta d",
        "ray up ray_clusters.yaml",
        "ray upp ray_cluster.yaml",
        "ray drain-node --node-id N --reason NONE --reason-message m",
        "serve deploy deploy/server.yaml",
        "serve run deploy.app:build_app modell=x",
        "mlflow server --backend-uri x",
        "make everything",
        """curl x -d '{"klass": "a"}'""",
        "docker build --file Dockerfile .",
        "docker push REGISTRY/meanflow-ray:9.9.9",
        "docker run --rm --gpu all REGISTRY/meanflow-ray:0.1.0",
        "aws ec2 create-security-group --group-name g",
        "aws ec2 create-security-groups --group-name g --description d",
        "aws ec2 create-security-group --group-nam g --description d",
        "aws ec2 describe-subnets --filters Nam=availability-zone,Values=a",
        "aws iam creat-role --role-name r --assume-role-policy-document {}",
        "aws s3 cp a b",
        "G=$(aws ec2 create-security-grup --group-name g --description d)",
        "aws ecr get-login-password | docker login --username AWS REGISTRY",
        "export RAY_API_SERVER_ADRESS=x",
        "pip install mlflow==3.17.1",
        "curl localhost:5000/healthy",
        "rm -rf /",
    ],
)
def test_a_misspelt_command_would_be_noticed(line, capsys):
    with pytest.raises((Exception, SystemExit)):
        understand(line)


# tests/deploy/test_kuberay.py reads this one; it names files of deploy/kuberay/base by their last names.
ELSEWHERE = "kubernetes.md"


def blocks(page: str) -> list[tuple[str, str]]:
    """(kind, text) of a page's fenced blocks."""
    parts = re.split(r"^```", text_of(page), flags=re.MULTILINE)
    assert len(parts) % 2, f"{page}: a block that does not end"
    return [tuple(block.split("\n", 1)) for block in parts[1::2]]


@pytest.mark.parametrize("page", PAGES)
def test_no_block_of_a_page_goes_unread(page):
    text = text_of(page)
    for kind, block in blocks(page):
        assert kind in ("bash", "python", "markdown", ""), kind
        if kind == "python":
            compile(block, page, "exec")
        # What is told to be no command has none.
        assert kind == "bash" or not any(line.split(" ")[0] in TOOLS for line in block.splitlines() if line), block
    if page == f"docs/{ELSEWHERE}":
        return
    marked = re.findall(r"<!-- ([\w-]+): (?:run|parsed) by (tests/[\w.]+) -->\n```bash\n", text)
    assert len(marked) == sum(kind == "bash" for kind, _ in blocks(page))
    for name, reader in marked:
        assert re.search(rf'["\']{name}["\']', text_of(reader)), (name, reader)
    if page.startswith("docs/") and marked:
        assert page in DOCUMENTS.values()


def test_every_command_of_the_readme_is_understood_by_what_would_run_it():
    lines = [line for kind, block in blocks("README.md") if kind == "bash" for line in block.splitlines() if line]
    assert len(lines) >= 30
    for line in lines:
        try:
            understand(line)
        except SystemExit as error:
            raise AssertionError(f"not understood: {line}") from error


def is_known(words: list[str]) -> bool:
    """Whether a command within a sentence is one, though what it wants may be left out."""
    if words[:2] == ["python", "-m"]:
        return (REPOSITORY / f"{words[2].replace('.', '/')}.py").is_file() or (
            REPOSITORY / words[2].replace(".", "/") / "__main__.py"
        ).is_file()
    if words[0] == "python":
        return (REPOSITORY / words[1]).is_file()
    group: click.Command = {"ray": ray_command_line, "serve": serve_command_line, "mlflow": mlflow_command_line}[
        words[0]
    ]
    rest = words[1:]
    while isinstance(group, click.Group) and rest:
        _, group, rest = group.resolve_command(click.Context(group), rest)
    options = {option for parameter in group.params for option in parameter.opts}
    return {word.split("=")[0] for word in rest if word.startswith("--")} <= options


def test_commands_within_sentences_are_commands():
    seen = 0
    for page in PAGES:
        if page == f"docs/{ELSEWHERE}":
            continue
        prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`]+)`", prose):
            words = code.replace("\n", " ").split()
            if len(words) > 1 and words[0] in ("python", "ray", "serve", "mlflow"):
                assert is_known(words), (page, code)
                seen += 1
            elif len(words) > 1 and words[0] == "make":
                understand_make(words[1:])
    assert seen >= 20


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
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


def test_files_that_the_documents_name_exist():
    documents = [
        *(REPOSITORY / "docs").glob("*.md"),
        *(REPOSITORY / name for name in ("SECURITY.md", "CHANGELOG.md", "NOTICE")),
    ]
    named = set()
    for path in documents:
        named |= set(re.findall(r"`((?:meanflow_core|pipelines|deploy|tests|docs)/[\w./-]+)`", path.read_text()))
        if path.name == ELSEWHERE:
            continue
        named |= set(re.findall(r"`([A-Z]\w+\.md|[\w-]+\.(?:txt|yaml|toml))`", path.read_text())) - {"table.md"}
    assert len(named) >= 20
    missing = {name for name in named if not (REPOSITORY / name).exists()}
    assert not missing


def test_options_that_the_documents_name_exist():
    required = ["--data", "d", "--storage", "s", "--run-name", "r"]
    for option in re.findall(
        r"`(--(?:rows|activation|parallelism|skip|keep|num-steps|device|precision|loss)[^`]*)`",
        text_of("docs/runbook.md"),
    ):
        words = option.split()
        if len(words) > 1 or option == "--activation-checkpointing":
            parse_training(["xl2", *required, *words])
        else:
            assert words[0].removeprefix("--").replace("-", "_") in Path(
                REPOSITORY / "pipelines/train/job.py"
            ).read_text() + text_of("meanflow_core/config.py")


def test_counted_figures_of_the_runbook_are_what_the_code_counts():
    text = text_of("docs/runbook.md")
    config = replace(PRESETS["xl2"](), precision="tf32")
    step = step_flops(config, **SIZES)
    assert f"{step / 1e12:.1f} TFLOP a step" in text
    assert f"{step * config.num_steps / 1e18:.1f} EFLOP" in text
    assert f"{config.num_steps:,} steps" in text
    assert f"{num_parameters(config.network, **SIZES) / 1e6:.1f} M parameters" in text
    assert f"a checkpoint of {checkpoint_bytes(config, **SIZES) / 1e9:.2f} GB" in text
    assert f"{3 * checkpoint_bytes(config, **SIZES) / 1e9:.1f} GB of checkpoints" in text  # two kept, one on its way
    assert f"{forward_flops(config.network, **SIZES) / 1e9:.0f} GFLOP of network" in text
    for rows in (8, 32):
        memory = memory_estimate(config, **SIZES, rows_per_pass=rows, num_shards=1)
        assert f"{memory.total / 1e9:.2f} GB" in text
    latents = 1_281_167 * 2 * 8 * 32 * 32 * 2
    assert f"{latents / 1e9:.1f} GB in {-(-1_281_167 // 512):,} shards" in text


def trial_words() -> list[str]:
    """The runbook's trial of training."""
    [line] = [line for line in commands("runbook") if "--submission-id trial " in line]
    words = shlex.split(line)
    return words[words.index("python") :]


def test_the_trial_of_training_can_be_stopped_and_goes_on():
    [encode, submit, stop] = [line for line in commands("runbook") if "trial" in line]
    context = understand_click(ray_command_line, shlex.split(submit)[1:])
    variables = json.loads(context.params["runtime_env_json"])["env_vars"]
    job_file = read_job_file(REPOSITORY / "deploy/jobs/train.yaml")
    assert job_file.env_vars.items() <= variables.items()  # time for a checkpoint when it is stopped
    assert stop.split()[-1] == context.params["submission_id"]
    _, job = parse_training(trial_words()[3:])
    assert job.config.checkpoint_interval_steps < job.config.num_steps
    assert job.data in shlex.split(encode)


def test_estimates_of_the_runbook_follow_from_its_assumptions():
    text = text_of("docs/runbook.md")
    sustained, price, spot = 50e12, 22.0, 10.0
    assert f"sustains {sustained / 1e12:.0f} TFLOP/s" in text
    assert f"**{price:.0f} dollars an hour**, {spot:.0f} as a spot machine" in text
    config = PRESETS["xl2"]()
    step = step_flops(config, **SIZES)
    hours = {gpus: step * config.num_steps / gpus / sustained / 3600 for gpus in (8, 32, 64)}
    assert (
        f"{hours[8]:.0f} h: {hours[8] / 24:.1f} days | {hours[32]:.1f} h: {hours[32] / 24:.1f} days | {hours[64]:.1f} h |"
        in text
    )
    assert f"{round(hours[8] * price, -1):,.0f}; spot {round(hours[8] * spot, -1):,.0f}" in text
    seconds = {gpus: step / gpus / sustained for gpus in (8, 32, 64)}
    assert f"{seconds[32]:.3f} s on 32 GPUs" in text
    assert f"One node of 8: {seconds[8]:.3f} s a step" in text
    gradient = 4 * num_parameters(config.network, **SIZES)
    ring = 2 * 31 / 32 * gradient
    assert f"{gradient / 1e9:.2f} GB in float32" in text
    assert f"{ring / 1e9:.1f} GB a step at 32" in text
    assert f"**{round(8 * ring / seconds[32] / 1e9, -1):.0f} Gbit/s a node**" in text
    assert f"{ring / 12.5e9:.2f} s a step" in text
    wide = 2 * 63 / 64 * gradient  # over a p4d's 400 Gbit/s it takes longer than the step computes
    assert f"{256 // 64} rows a GPU: {seconds[64]:.3f} s a step" in text
    assert f"**{round(8 * wide / seconds[64] / 1e9, -1):.0f} Gbit/s a node**" in text
    bound = 8 * wide / 400e9 * config.num_steps / 3600
    assert f"{int(bound)} h instead of {hours[64]:.0f} at best" in text
    trial = parse_training(trial_words()[3:])[1].config.num_steps * seconds[8]
    assert 5 * 60 < trial < 15 * 60  # an hour with the machine's start, the encode and a stop
    assert "| an hour | | | 22 |" in text
    interval = parse_training(shlex.split(read_job_file(REPOSITORY / "deploy/jobs/train.yaml").entrypoint)[3:])[1]
    steps = interval.config.checkpoint_interval_steps
    assert (
        f"every {steps:,} steps: {steps * seconds[32] / 60:.0f} minutes on 32 GPUs, {steps * seconds[8] / 60:.0f} on 8"
        in text
    )
    # An encoder of SD-VAE's shape takes 272.7 GFLOP an image of 256 pixels, its decoder 622.2 (torch's FlopCounterMode).
    encode = 2 * 272.7e9
    assert f"{encode * 1_281_167 / 1e15:.0f} PFLOP: {encode / 1e9:.0f} GFLOP an image" in text
    assert (
        f"encode {8 * sustained / encode:.0f} a second" in text
        or f"encode {int(8 * sustained / encode) + 1} a second" in text
    )


def test_epochs_of_the_table_are_steps_of_the_preset():
    text = text_of("docs/runbook.md")
    steps_per_epoch = PRESETS["xl2"]().num_steps // 240
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("| ")
    }
    epochs = rows[f"epochs of {steps_per_epoch:,} steps"]
    assert rows["steps"][:4] == [f"{int(epoch) * steps_per_epoch:,}" for epoch in epochs[:4]]
    for preset, name in (("b2", "B/2"), ("m2", "M/2"), ("l2", "L/2"), ("xl2", "XL/2")):
        assert f"FID {rows[name][3]}" in PRESETS[preset].__doc__  # the published figure, written in both places


def test_jobs_of_the_runbook_and_of_the_job_files_train_the_same_run():
    [line] = [line for line in commands("runbook") if "train-xl2-40" in line]
    words = shlex.split(line)
    preset, early = parse_training(words[words.index("pipelines.train") + 1 :])
    whole_preset, whole = parse_training(
        shlex.split(read_job_file(REPOSITORY / "deploy/jobs/train.yaml").entrypoint)[3:]
    )
    assert preset == whole_preset
    # Where they lie, and the length, may differ; else the second would be refused, as another experiment.
    assert replace(early.config, num_steps=whole.config.num_steps) == whole.config
    assert (early.run_name, early.mirror, early.init_from) == (whole.run_name, whole.mirror, whole.init_from)
    assert early.config.num_steps == 40 * 5004


def job_of(stage: str) -> list[str]:
    """The words of a job file's command, its storage as the runbook has it."""
    entrypoint = read_job_file(REPOSITORY / f"deploy/jobs/{stage}.yaml").entrypoint
    return shlex.split(entrypoint.replace("$STORAGE", "s3://BUCKET/imagenet"))


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_steps_of_the_runbook_take_what_the_steps_before_left():
    lines = commands("runbook")

    def line_with(part: str) -> list[str]:
        [line] = [line for line in lines if part in line]
        return shlex.split(line)

    encode, train, evaluate = (job_of(stage) for stage in ("encode", "train", "evaluate"))
    images = option(encode, "--images")
    assert line_with("aws s3 sync")[-1] == images
    # Beside Data/, where it is when the images are unpacked; pipelines/images/sources.py looks there.
    assert line_with("aws s3 cp")[-1] == images.removesuffix("Data/CLS-LOC/train") + "LOC_synset_mapping.txt"
    assert "STORAGE=s3://BUCKET/imagenet" in line_with("STORAGE=")
    assert option(line_with("pipelines.check"), "--data") == option(encode, "--output") == option(train, "--data")
    reference = line_with("pipelines.reference")
    assert (option(reference, "--images"), option(reference, "--output")) == (images, option(evaluate, "--reference"))
    assert option(reference, "--extractor") == option(evaluate, "--extractor")
    for line in lines:
        if "pipelines.train" in line and "trial" not in line:
            words = shlex.split(line)
            assert option(words, "--data") == option(train, "--data")
            assert option(words, "--storage") == option(train, "--storage")
        if "latent_cache" in line:
            assert option(shlex.split(line), "--cache-dir") == option(train, "--cache-dir")
    jobs = {read_job_file(path).submission_id for path in (REPOSITORY / "deploy/jobs").glob("*.yaml")}
    for command in ("deploy.jobs follow", "deploy.jobs stop train", "ray job logs"):
        assert line_with(command)[-1] in jobs
    served = yaml.safe_load(text_of("deploy/serve.yaml"))
    model = served["applications"][0]["args"]["model"]
    assert model == option(evaluate, "--model") == shlex.split(line_with("deploy.models")[-1])[-1]
    port = str(served["http_options"]["port"])
    tunnel = line_with("--remote-port")
    assert option(tunnel, "--remote-port") == option(tunnel, "--port") == port
    assert f"127.0.0.1:{port}/generate" in line_with("/generate")


def test_addresses_of_the_runbook_are_those_of_the_cluster():
    lines = commands("runbook")
    [server] = [shlex.split(line) for line in lines if line.startswith("mlflow server")]
    uri = "http://MLFLOW:5000"
    assert f"MLFLOW_TRACKING_URI={uri}" in text_of("ray_cluster.yaml")
    assert f"MLFLOW:{option(server, '--port')},localhost:5000" == option(server, "--allowed-hosts")
    assert all(uri in line for line in lines if "MLFLOW_TRACKING_URI" in line)
    [exported] = [line for line in lines if "RAY_API_SERVER_ADDRESS" in line]
    assert exported == "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 RAY_AUTH_MODE=token"  # Ray's, by the tunnel
    region = yaml.safe_load(text_of("ray_cluster.yaml"))["provider"]["region"]
    assert f"export AWS_DEFAULT_REGION={region}" in lines
    # P machines, on demand and spot, as AWS names these quotas.
    assert {code for line in lines for code in re.findall(r"--quota-code (\S+)", line)} == {"L-417A185B", "L-7212CCBC"}


def test_the_walk_through_for_own_images_takes_what_it_made():
    lines = [shlex.split(line) for line in commands("own-images")]
    made = {option(words, "--output") for words in lines if "pipelines.encode" in words}
    trained = [words for words in lines if "pipelines.train" in words]
    for words in trained:
        if not option(words, "--data").startswith("more-"):
            assert option(words, "--data") in made
        if "--validation-data" in words:
            assert option(words, "--validation-data") in made
    generators = {f"{option(words, '--storage')}/{option(words, '--run-name')}/generator" for words in trained}
    taken = [option(words, name) for words in lines for name in ("--model", "--init-from") if name in words]
    taken += [word.removeprefix("model=") for words in lines for word in words if word.startswith("model=")]
    assert len(taken) == 3
    assert set(taken) <= generators
    [uri] = [option(words, "--backend-store-uri") for words in lines if words[0] == "mlflow"]
    assert uri == f"sqlite:///{option(trained[0], '--storage')}/mlflow.db"
