"""Recomputes the runbook's figures, and checks that its steps read what earlier steps wrote."""

import math
import re
import shlex
from dataclasses import replace
from functools import cache

import pytest
import yaml

from meanflow_core.presets import PRESETS
from pipelines.plan.cost import checkpoint_bytes, forward_flops, memory_estimate, num_parameters, step_flops
from tests.support.command_lines import parse_command, parse_job
from tests.support.job_scripts import JOBS, STAGES, submission
from tests.support.readme import commands, text_of

SIZES = {"sample_size": 32, "in_channels": 4, "num_classes": 1000}
XL2 = replace(PRESETS["xl2"](), precision="tf32")
NUM_IMAGES = 1_281_167
GPU_FLOPS, NODE_PRICE, SPOT_PRICE = 50e12, 22.0, 10.0  # the runbook's assumptions


@cache
def xl2_step_flops() -> float:
    return step_flops(XL2, **SIZES)


@pytest.fixture(scope="module")
def text() -> str:
    return text_of("docs/how-to/aws.md")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return commands("runbook", "docs/how-to/aws.md")


def line_with(lines: list[str], part: str) -> list[str]:
    """The words of the only line with this part."""
    [line] = [line for line in lines if part in line]
    return shlex.split(line)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


# Figures.


def test_counted_figures_are_those_of_the_code(text):
    config, step = XL2, xl2_step_flops()
    assert f"{step / 1e12:.1f} TFLOP a step" in text
    assert f"{step * config.num_steps / 1e18:.1f} EFLOP" in text
    assert f"{config.num_steps:,} steps" in text
    assert f"{num_parameters(config.network, **SIZES) / 1e6:.1f} M parameters" in text
    assert f"a checkpoint of {checkpoint_bytes(config, **SIZES) / 1e9:.2f} GB" in text
    # Two are kept while a third is written.
    assert f"{3 * checkpoint_bytes(config, **SIZES) / 1e9:.1f} GB of checkpoints" in text
    assert f"{forward_flops(config.network, **SIZES) / 1e9:.0f} GFLOP of network" in text
    latents = NUM_IMAGES * 2 * 8 * 32 * 32 * 2
    assert f"{latents / 1e9:.1f} GB in {math.ceil(NUM_IMAGES / 512):,} shards" in text


@pytest.mark.soak
def test_memory_figures_are_those_of_the_code(text):
    for rows in (8, 32):
        memory = memory_estimate(XL2, **SIZES, samples_per_pass=rows, num_shards=1)
        assert f"{memory.total / 1e9:.2f} GB" in text


def test_hours_and_prices_follow_from_the_assumptions(text):
    assert f"sustains {GPU_FLOPS / 1e12:.0f} TFLOP/s" in text
    assert f"**{NODE_PRICE:.0f} dollars an hour**, {SPOT_PRICE:.0f} as a spot machine" in text
    config, step = XL2, xl2_step_flops()
    hours = {gpus: step * config.num_steps / gpus / GPU_FLOPS / 3600 for gpus in (8, 32, 64)}
    for gpus in (8, 32):
        assert f"| {hours[gpus]:.{0 if gpus == 8 else 1}f} h: {hours[gpus] / 24:.1f} days |" in text
    assert f"| {hours[64]:.1f} h |" in text
    assert f"{round(hours[8] * NODE_PRICE, -1):,.0f}; spot {round(hours[8] * SPOT_PRICE, -1):,.0f}" in text
    trial = parse_trial()[1].config.num_steps * step / 8 / GPU_FLOPS
    assert 5 * 60 < trial < 15 * 60  # with the machine's start, the encode and a stop: an hour
    assert "| an hour | | | 22 |" in text
    interval = parse_job("train")[1].config.checkpoint_interval_steps
    minutes = {gpus: interval * step / gpus / GPU_FLOPS / 60 for gpus in (8, 32)}
    assert f"every {interval:,} steps: {minutes[32]:.0f} minutes on 32 GPUs, {minutes[8]:.0f} on 8" in text
    # An encoder of SD-VAE's shape takes 272.7 GFLOP per image of 256 pixels, measured with torch's FlopCounterMode.
    encode = 2 * 272.7e9
    assert f"{encode * NUM_IMAGES / 1e15:.0f} PFLOP: {encode / 1e9:.0f} GFLOP an image" in text
    assert f"encode {math.ceil(8 * GPU_FLOPS / encode)} a second" in text


def test_network_figures_follow_from_the_gradient_and_the_step(text):
    config, step = XL2, xl2_step_flops()
    seconds = {gpus: step / gpus / GPU_FLOPS for gpus in (8, 32, 64)}
    assert f"One node of 8: {seconds[8]:.3f} s a step" in text
    assert f"{seconds[32]:.3f} s on 32 GPUs" in text
    gradient = 4 * num_parameters(config.network, **SIZES)
    assert f"{gradient / 1e9:.2f} GB in float32" in text
    ring = {gpus: 2 * (gpus - 1) / gpus * gradient for gpus in (32, 64)}
    assert f"{ring[32] / 1e9:.1f} GB a step at 32" in text
    assert f"**{round(8 * ring[32] / seconds[32] / 1e9, -1):.0f} Gbit/s a node**" in text
    assert f"{ring[32] / 12.5e9:.2f} s a step" in text  # over 100 Gbit/s
    # On 64 GPUs, a p4d's 400 Gbit/s take longer than the computation.
    assert f"{256 // 64} rows a GPU: {seconds[64]:.3f} s a step" in text
    assert f"**{round(8 * ring[64] / seconds[64] / 1e9, -1):.0f} Gbit/s a node**" in text
    network_hours = int(8 * ring[64] / 400e9 * config.num_steps / 3600)
    assert f"{network_hours} h instead of {seconds[64] * config.num_steps / 3600:.0f} at best" in text


def test_epochs_of_the_table_are_steps_of_the_presets(text):
    steps_per_epoch = XL2.num_steps // 240
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("| ")
    }
    epochs = rows[f"epochs of {steps_per_epoch:,} steps"]
    assert rows["steps"][:4] == [f"{int(epoch) * steps_per_epoch:,}" for epoch in epochs[:4]]
    for preset, name in (("b2", "B/2"), ("m2", "M/2"), ("l2", "L/2"), ("xl2", "XL/2")):
        assert f"FID {rows[name][3]}" in PRESETS[preset].__doc__  # the published figure, written in both places


# Steps.


def parse_trial() -> tuple:
    """(preset, options) of the trial training."""
    [line] = [line for line in commands("runbook", "docs/how-to/aws.md") if "--submission-id trial " in line]
    return parse_command(line)


def test_trial_training_reads_the_trial_latents_and_can_be_stopped_and_resumed(lines):
    _, job = parse_trial()
    assert job.config.checkpoint_interval_steps < job.config.num_steps
    assert job.data == option(line_with(lines, "trial-encode"), "--output")
    assert option(line_with(lines, "--submission-id trial "), "--runtime-env") == "deploy/jobs/runtime_env.yaml"
    assert "ray job stop trial" in lines


def test_short_and_whole_training_are_one_run(lines):
    [line] = [line for line in lines if "train-xl2-40" in line]
    preset, short = parse_command(line)
    whole_preset, whole = parse_job("train")
    assert preset == whole_preset
    assert short.config.num_steps == 40 * 5004
    # Otherwise the second command would be refused, because the run belongs to another experiment.
    assert replace(short, config=replace(short.config, num_steps=whole.config.num_steps)) == whole


def test_steps_read_what_the_steps_before_wrote(lines):
    encode, train, evaluate = (submission(stage).arguments for stage in STAGES)
    images = option(encode, "--images")
    assert line_with(lines, "aws s3 sync")[-1] == images
    # pipelines/images looks for the mapping next to Data/.
    assert line_with(lines, "aws s3 cp")[-1] == images.removesuffix("Data/CLS-LOC/train") + "LOC_synset_mapping.txt"
    assert "export STORAGE=s3://BUCKET/imagenet" in lines
    assert (
        option(line_with(lines, "pipelines.check"), "--data") == option(encode, "--output") == option(train, "--data")
    )
    reference = line_with(lines, "pipelines.reference")
    assert option(reference, "--images") == option(encode, "--output")  # the images of the latents
    assert option(reference, "--output") == option(evaluate, "--reference")
    assert option(reference, "--extractor") == option(evaluate, "--extractor")
    for line in lines:
        words = shlex.split(line)
        if "pipelines.train" in line and "trial" not in line:
            assert option(words, "--data") == option(train, "--data")
            assert option(words, "--storage") == option(train, "--storage")
        if "latent_cache" in line:
            assert option(words, "--cache-dir") == option(train, "--cache-dir")
    ids = {submission(stage).options["submission_id"] for stage in STAGES}
    for command in ("ray job logs -f", "ray job stop train", "ray job logs train"):
        assert line_with(lines, command)[-1] in ids


def test_endpoint_serves_the_evaluated_model_through_the_tunnel(lines):
    config = yaml.safe_load(text_of("deploy/serve.yaml"))
    model = config["applications"][0]["args"]["model"]
    evaluated = option(submission("evaluate").arguments, "--model")
    assert model == shlex.split(line_with(lines, "deploy.models")[-1])[-1]
    assert model.endswith("@champion")
    assert evaluated == model.replace("@champion", "@candidate")
    port = str(config["http_options"]["port"])
    tunnel = line_with(lines, "--remote-port")
    assert option(tunnel, "--remote-port") == option(tunnel, "--port") == port
    assert f"127.0.0.1:{port}/generate" in line_with(lines, "/generate")


def test_addresses_are_those_of_the_cluster(lines):
    uri = "http://MLFLOW:5000"
    server = line_with(lines, "mlflow server")
    assert f"MLFLOW:{option(server, '--port')},localhost:5000" == option(server, "--allowed-hosts")
    assert f"MLFLOW_TRACKING_URI={uri}" in text_of("ray_cluster.yaml")
    assert yaml.safe_load((JOBS / "runtime_env.yaml").read_text())["env_vars"]["MLFLOW_TRACKING_URI"] == uri
    # Through the tunnel that `ray dashboard` opens.
    assert "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 RAY_AUTH_MODE=token" in lines
    region = yaml.safe_load(text_of("ray_cluster.yaml"))["provider"]["region"]
    assert f"export AWS_DEFAULT_REGION={region}" in lines
    # AWS's codes for P machines: on demand, and spot.
    assert {code for line in lines for code in re.findall(r"--quota-code (\S+)", line)} == {"L-417A185B", "L-7212CCBC"}
