"""Checks that the README's commands read what earlier ones write, and that its tables name existing options."""

import re
import shlex

from deploy.settings import API_SETTINGS, GENERATOR_SETTINGS, Arguments
from meanflow_core.interop.conversion import SOURCES
from pipelines.evaluate.samples import Setting
from tests.support.command_lines import parse_command, parse_module
from tests.support.readme import commands, text_of


def parsed(name: str) -> list:
    return [parse_command(line) for line in commands(name)]


def section(start: str, end: str) -> str:
    text = text_of("README.md")
    return text[text.index(f"### {start}") : text.index(f"### {end}")]


def test_cluster_commands_name_gpus_and_workers():
    encode, (preset, train), evaluate = (parse_command(line) for line in commands("cluster") if "job submit" in line)
    assert (evaluate.model, evaluate.num_workers) == (f"models:/meanflow-{preset}@candidate", 8)
    assert evaluate.promote
    assert (encode.image_size, encode.num_workers) == (256, 8)
    assert (preset, train.num_workers) == ("xl2", 32)
    assert train.data == encode.output
    # A cluster that scales from zero has no GPUs when the driver looks, and the stages would choose CPUs.
    assert {encode.device, train.device, evaluate.device} == {"gpu"}


def test_check_reads_the_encoded_latents():
    *encodes, check = parsed("encode")
    assert [job.limit for job in encodes] == [None, None, None, 2000]
    assert check.data == encodes[0].output


def test_cache_commands_list_and_evict():
    assert [(job.evict, job.unused_days) for job in parsed("cache")] == [((), 0.0), (("all",), 30.0)]


def test_training_starts_from_the_converted_checkpoint():
    convert, (preset, train), (_, train_from_file) = parsed("convert")
    assert convert.source in SOURCES
    assert (preset, train.init_from, train.init_source) == ("xl2", convert.output, None)
    assert (train_from_file.init_from, train_from_file.init_source) == (str(convert.checkpoint), convert.source)


def test_evaluations_use_the_documented_reference_and_reports():
    _, reference, plain, guided, other_average, file, both = parsed("evaluate")
    assert plain.reference == str(reference.output)
    assert (plain.num_samples, plain.labels, len(plain.settings), len(guided.settings)) == (50_000, "random", 2, 18)
    assert guided.settings[-1] == Setting(num_steps=4, guidance_scale=12.0, guidance_interval=(0.3, 0.7))
    assert (other_average.model, file.model) == ("runs/xl2/generator-ema-0.9995", None)
    assert both.reports == (str(plain.output), str(other_average.output))


def test_endpoint_requests_parse_and_its_table_names_settings_that_exist():
    images, file, *_ = parsed("endpoint")
    assert (images.n, file.seed_end) == (4, 2)
    text = section("An endpoint that answers now", "What the stages hand")
    table = text[text.index("| | how |") :]
    named = set(re.findall(r"`(\w+)(?:=[\w.]+)?`", table)) - {"max_batch"}
    assert len(named) >= 10
    assert named <= set(Arguments.model_fields)
    assert set(Arguments.model_fields) >= GENERATOR_SETTINGS | API_SETTINGS


def test_training_options_that_the_table_names_exist():
    options = re.findall(r"`(--[^`]+)`", section("A training that survives", "An evaluation that"))
    assert len(options) >= 7
    for option in options:
        parse_module("pipelines.train", shlex.split(f"xl2 --data d --storage s --run-name r {option}"))
