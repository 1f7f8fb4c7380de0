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
from mlflow.cli import cli as mlflow_command_line
from ray.scripts.scripts import cli as ray_command_line
from ray.serve.scripts import cli as serve_command_line
from sqlalchemy.engine import make_url

from deploy.jobs.__main__ import parse_arguments as parse_jobs
from deploy.jobs.job_file import read_job_file
from deploy.schema import Arguments, GenerateRequest
from meanflow_core.cost import checkpoint_bytes, forward_flops, memory_estimate, num_parameters, step_flops
from meanflow_core.presets import PRESETS
from pipelines.check import CheckJob
from pipelines.encode import EncodeJob
from pipelines.evaluate import EvaluateJob
from pipelines.latent_cache import CacheJob
from pipelines.reference import ReferenceJob
from pipelines.train import parse_arguments as parse_training

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = {"runbook": "docs/runbook.md", "own-images": "docs/own-images.md", "upgrading": "docs/upgrading.md"}
SIZES = {"sample_size": 32, "in_channels": 4, "num_classes": 1000}


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text()


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
    "pipelines.latent_cache": of_class(CacheJob),
    "pipelines.reference": of_class(ReferenceJob),
    "pipelines.train": parse_training,
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
    if "-d" in words:
        GenerateRequest.model_validate(json.loads(words[words.index("-d") + 1]))


def understand_docker(words: list[str]) -> None:
    assert words[0] in ("build", "push", "run")
    if words[0] == "build":
        assert (REPOSITORY / words[words.index("--file") + 1]).is_file()
        assert words[-1] == "."


def understand_make(words: list[str]) -> None:
    for target in words:
        assert re.search(rf"^{target}:", text_of("Makefile"), re.MULTILINE), target


def understand_pip(words: list[str]) -> None:
    assert (REPOSITORY / words[words.index("--constraint") + 1]).is_file()


def understand_nothing_of_ours(words: list[str]) -> None:
    """A tool of a cloud, or the shell's own: there is nothing of this project to check."""


TOOLS: dict[str, Callable[[list[str]], object]] = {
    "python": understand_python,
    "ray": understand_ray,
    "serve": understand_serve,
    "mlflow": lambda words: understand_click(mlflow_command_line, words),
    "curl": understand_curl,
    "docker": understand_docker,
    "make": understand_make,
    "pip": understand_pip,
    **dict.fromkeys(("aws", "export", "source"), understand_nothing_of_ours),
}


def understand(line: str) -> object:
    """What a line would run, by its real parser. Raises whatever that raises, or KeyError for an unknown command."""
    words = shlex.split(line, comments=True)
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
        "rm -rf /",
    ],
)
def test_a_misspelt_command_would_be_noticed(line, capsys):
    with pytest.raises((Exception, SystemExit)):
        understand(line)


# tests/deploy/test_kuberay.py reads this one; it names files of deploy/kuberay/base by their last names.
ELSEWHERE = "kubernetes.md"


def test_no_block_of_commands_in_the_documents_goes_unparsed():
    for path in sorted((REPOSITORY / "docs").glob("*.md")):
        if path.name == ELSEWHERE:
            continue
        text = path.read_text()
        marked = len(re.findall(r"<!-- [\w-]+: parsed by tests/test_docs.py -->\n```bash\n", text))
        assert marked == text.count("```bash"), path
        if marked:
            assert f"docs/{path.name}" in DOCUMENTS.values()


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
        r"`(--(?:rows|activation|parallelism|skip|keep|num-steps|use-gpu|precision|loss)[^`]*)`",
        text_of("docs/runbook.md"),
    ):
        words = option.split()
        if len(words) > 1 or option == "--activation-checkpointing":
            parse_training(["xl2", *required, *words])
        else:
            assert words[0].removeprefix("--").replace("-", "_") in Path(
                REPOSITORY / "pipelines/training_job.py"
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


def test_estimates_of_the_runbook_follow_from_its_assumptions():
    text = text_of("docs/runbook.md")
    sustained, price, spot = 50e12, 22.0, 10.0
    assert f"sustains {sustained / 1e12:.0f} TFLOP/s" in text
    assert f"**{price:.0f} dollars an hour**, {spot:.0f} as a spot machine" in text
    config = PRESETS["xl2"]()
    step = step_flops(config, **SIZES)
    hours = {gpus: step * config.num_steps / gpus / sustained / 3600 for gpus in (8, 32)}
    assert f"{hours[8]:.0f} h: {hours[8] / 24:.1f} days | {hours[32]:.1f} h: {hours[32] / 24:.1f} days" in text
    assert f"{round(hours[8] * price, -1):,.0f}; spot {round(hours[8] * spot, -1):,.0f}" in text
    seconds = {gpus: step / gpus / sustained for gpus in (8, 32)}
    assert f"{seconds[32]:.3f} s on 32 GPUs" in text
    assert f"One node of 8: {seconds[8]:.3f} s a step" in text
    gradient = 4 * num_parameters(config.network, **SIZES)
    ring = 2 * 31 / 32 * gradient
    assert f"{gradient / 1e9:.2f} GB in float32" in text
    assert f"{ring / 1e9:.1f} GB a step at 32" in text
    assert f"**{round(8 * ring / seconds[32] / 1e9, -1):.0f} Gbit/s a node**" in text
    assert f"{ring / 12.5e9:.2f} s a step" in text
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
