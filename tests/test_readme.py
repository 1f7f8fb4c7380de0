"""Checks that the commands of README.md and the how-tos fit each other, that options exist, and that sentences are short."""

import re
import shlex

import pytest

from meanflow_core.interop.conversion import SOURCES
from pipelines.demo.job import Demo
from pipelines.evaluate.samples import Setting
from tests.support.command_lines import parse_command, parse_module
from tests.support.readme import REPOSITORY, commands, text_of

HOW_TO = "docs/how-to/"


def parsed(name: str, page: str) -> list:
    return [parse_command(line) for line in commands(name, HOW_TO + page)]


def between(page: str, start: str, end: str) -> str:
    text = text_of(page)
    return text[text.index(start) : text.index(end)]


def test_the_readme_is_short():
    text = text_of("README.md")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1300


def sentences(page: str) -> list[str]:
    """The sentences of a page's paragraphs and lists, without code, tables, headings and links' addresses."""
    text = re.sub(
        r"^```.*?^```|<!--.*?-->|^(?:\||#|!\[|    |>? ?\|).*?$", "", text_of(page), flags=re.MULTILINE | re.DOTALL
    )
    text = re.sub(r"\]\([^)]*\)", "]", text)
    parts = re.split(r"(?<=[.!?:])\s+|\n\s*\n|\n\s*(?:-|\d\.) ", text)
    return [part for part in parts if len(re.findall(r"[A-Za-z]{2,}", part)) >= 3]


@pytest.mark.parametrize("page", ["README.md", *sorted(path.name for path in (REPOSITORY / HOW_TO).glob("*.md"))])
def test_sentences_are_short(page):
    found = sentences(page if page == "README.md" else HOW_TO + page)
    lengths = [len(sentence.split()) for sentence in found]
    assert sum(lengths) / len(lengths) <= 20, sorted(found, key=lambda sentence: -len(sentence.split()))[:5]


def test_cluster_commands_name_gpus_and_workers():
    lines = commands("existing-cluster", HOW_TO + "existing-cluster.md")
    encode, (preset, train), reference, evaluate = (parse_command(line) for line in lines if "job submit" in line)
    assert str(reference.output) == evaluate.reference
    assert reference.images == encode.output
    assert (evaluate.model, evaluate.num_workers) == (f"models:/meanflow-{preset}@candidate", 8)
    assert evaluate.promote
    assert (encode.image_size, encode.num_workers) == (256, 8)
    assert (preset, train.num_workers) == ("xl2", 32)
    assert train.data == encode.output
    # A cluster that scales from zero has no GPUs when the driver looks, and the stages would choose CPUs.
    assert {encode.device, train.device, reference.device, evaluate.device} == {"gpu"}


def test_five_commands_of_imagenet_read_what_the_earlier_ones_wrote():
    encode, (preset, train), reference, evaluate, serve = (parse_command(line) for line in commands("imagenet"))
    assert (train.data, preset, train.num_workers) == (encode.output, "xl2", 8)
    assert evaluate.reference == str(reference.output)
    assert evaluate.model == serve.arguments.model == f"{train.storage}/{train.run_name}/generator"


def test_first_commands_serve_the_demos_generator():
    serve, _ = (parse_command(line) for line in commands("first"))
    assert serve.arguments.model == f"{Demo().work}/runs/demo/generator"


def test_training_page_evaluates_what_it_trained():
    _, (_, dry), (preset, train), _, evaluate = parsed("train", "train.md")
    assert dry.dry_run
    assert evaluate.model == f"{train.storage}/{train.run_name}/generator"
    assert preset == "xl2"


def test_check_reads_the_encoded_latents():
    *encodes, check = parsed("encode", "encode.md")
    assert [job.limit for job in encodes] == [None, None, None, 2000]
    assert check.data == encodes[0].output


def test_cache_commands_list_and_evict():
    assert [(job.evict, job.unused_days) for job in parsed("cache", "encode.md")] == [((), 0.0), (("all",), 30.0)]


def test_training_starts_from_the_converted_checkpoint():
    convert, (preset, train), (_, train_from_file) = parsed("convert", "convert.md")
    assert convert.source in SOURCES
    assert (preset, train.init_from, train.init_source) == ("xl2", convert.output, None)
    assert (train_from_file.init_from, train_from_file.init_source) == (str(convert.checkpoint), convert.source)


def test_evaluations_use_the_documented_reference_and_reports():
    _, _, reference, plain, guided, other_average, file, both = parsed("evaluate", "evaluate.md")
    assert plain.reference == str(reference.output)
    assert (plain.num_samples, plain.labels, len(plain.settings), len(guided.settings)) == (50_000, "random", 2, 18)
    assert guided.settings[-1] == Setting(num_steps=4, guidance_scale=12.0, guidance_interval=(0.3, 0.7))
    assert (other_average.model, file.model) == ("runs/xl2/generator-ema-0.9995", None)
    assert both.reports == (str(plain.output), str(other_average.output))


def test_options_that_the_tables_name_exist():
    options = re.findall(r"`(--[^`]+)`", between("docs/how-to/resume.md", "| you want to", "A notice"))
    options += re.findall(r"`(--[^`]+)`", between("docs/how-to/train.md", "## If it does not fit", "## What to watch"))
    assert len(options) >= 8
    for option in options:
        parse_module("pipelines.train", shlex.split(f"xl2 --data d --storage s --run-name r {option}"))
