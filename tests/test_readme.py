import shlex
import tomllib

import pytest
import tyro

from deploy.api.schema import GenerateRequest, ImagesRequest
from deploy.settings import API_SETTINGS, GENERATOR_SETTINGS, Arguments
from meanflow_core.interop import SOURCES
from pipelines.check import CheckJob
from pipelines.convert.job import ConvertJob
from pipelines.encode.job import EncodeJob
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.reference import ReferenceJob
from pipelines.evaluate.samples import Setting
from pipelines.evaluate.side_by_side import SideBySideJob
from pipelines.latents.cache import CacheJob
from pipelines.train.run import parse_arguments
from tests.support.readme import REPOSITORY, commands


def test_cluster_commands_are_understood_by_the_real_parsers():
    jobs = [
        shlex.split(line)[shlex.split(line).index("--") + 1 :] for line in commands("cluster") if "job submit" in line
    ]
    encode, train, evaluate = jobs
    assert evaluate[:3] == ["python", "-m", "pipelines.evaluate"]
    evaluation = tyro.cli(EvaluateJob, args=evaluate[3:])
    assert (evaluation.model, evaluation.num_workers) == ("models:/meanflow-xl2@champion", 8)
    assert encode[:3] == ["python", "-m", "pipelines.encode"]
    encoding = tyro.cli(EncodeJob, args=encode[3:])
    assert (encoding.image_size, encoding.num_workers) == (256, 8)
    assert train[:3] == ["python", "-m", "pipelines.train"]
    preset, job = parse_arguments(train[3:])
    assert (preset, job.num_workers) == ("xl2", 32)
    # A cluster that scales from nothing has no GPUs when the driver looks, and the stages would go to CPUs.
    assert {encoding.device, job.device, evaluation.device} == {"gpu"}


def test_encoding_commands_are_understood_by_the_real_parsers():
    *encodes, check = (shlex.split(line) for line in commands("encode"))
    jobs = [tyro.cli(EncodeJob, args=words[3:]) for words in encodes]
    assert {tuple(words[:3]) for words in encodes} == {("python", "-m", "pipelines.encode")}
    assert [job.limit for job in jobs] == [None, None, None, 2000]
    assert check[:3] == ["python", "-m", "pipelines.check"]
    assert tyro.cli(CheckJob, args=check[3:]).data == jobs[0].output


def test_cache_commands_are_understood_by_the_real_parser():
    jobs = [tyro.cli(CacheJob, args=shlex.split(line)[3:]) for line in commands("cache")]
    assert [(job.evict, job.unused_days) for job in jobs] == [((), 0.0), (("all",), 30.0)]


def test_conversion_commands_are_understood_by_the_real_parsers():
    convert, train, of_file = (shlex.split(line) for line in commands("convert"))
    assert convert[:3] == ["python", "-m", "pipelines.convert"]
    assert tyro.cli(ConvertJob, args=convert[3:]).source in SOURCES
    assert train[:3] == ["python", "-m", "pipelines.train"]
    preset, job = parse_arguments(train[3:])
    converted = tyro.cli(ConvertJob, args=convert[3:])
    assert (preset, job.init_from, job.init_source) == ("xl2", converted.output, None)
    _, job = parse_arguments(of_file[3:])
    assert (job.init_from, job.init_source) == (str(converted.checkpoint), converted.source)


def test_evaluation_commands_are_understood_by_the_real_parsers():
    install, *lines = (shlex.split(line, comments=True) for line in commands("evaluate"))
    jobs = {
        "pipelines.reference": ReferenceJob,
        "pipelines.evaluate": EvaluateJob,
        "pipelines.side_by_side": SideBySideJob,
    }
    reference, plain, guided, other_average, file, both = (tyro.cli(jobs[words[2]], args=words[3:]) for words in lines)
    assert {words[1] for words in lines} == {"-m"}
    assert plain.reference == str(reference.output)
    assert (plain.num_samples, plain.labels, len(plain.settings), len(guided.settings)) == (50_000, "random", 2, 18)
    assert guided.settings[-1] == Setting(num_steps=4, guidance_scale=12.0, guidance_interval=(0.3, 0.7))
    assert (other_average.ema_decay, file.model) == (0.9995, None)
    assert both.reports == (str(plain.output), str(other_average.output))
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert install[-1] == f".[{next(name for name in extras if name == 'fid')}]"


def test_requests_to_the_endpoint_fit_its_schema_and_its_table_names_settings_that_there_are():
    import json
    import re

    images, file, classes, models, keys, deploy = (shlex.split(line, comments=True) for line in commands("endpoint"))
    assert ImagesRequest.model_validate(json.loads(images[-1])).n == 4
    assert GenerateRequest.model_validate(json.loads(file[file.index("-d") + 1])).seed_end == 2
    assert classes == ["curl", "127.0.0.1:8000/classes?search=sta"]
    assert (models[:3], keys[:3]) == (["python", "-m", "deploy.models"], ["python", "-m", "deploy.keys"])
    assert (REPOSITORY / deploy[2]).is_file()
    text = (REPOSITORY / "README.md").read_text()
    section = text[text.index("### An endpoint that answers now") : text.index("### What the stages hand")]
    table = section[section.index("| | how |") :]
    named = set(re.findall(r"`(\w+)(?:=[\w.]+)?`", table)) - {"max_batch"}
    assert named <= set(Arguments.model_fields), named - set(Arguments.model_fields)
    assert set(Arguments.model_fields) >= GENERATOR_SETTINGS | API_SETTINGS


def test_options_that_the_table_of_training_names_exist():
    import re

    text = (REPOSITORY / "README.md").read_text()
    section = text[text.index("### A training that survives") : text.index("### An evaluation that")]
    options = re.findall(r"`(--[^`]+)`", section)
    assert len(options) >= 7
    for option in options:
        parse_arguments(["xl2", "--data", "d", "--storage", "s", "--run-name", "r", *option.split()])


def test_a_misspelt_option_would_be_noticed(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(EncodeJob, args=["--image", "x", "--output", "y", "--vae", "z"])


def test_pictures_and_files_that_the_readme_names_exist():
    import re

    text = (REPOSITORY / "README.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    files = re.findall(r"`((?:meanflow_core|pipelines|deploy|tests)/[\w./]+)`", text)
    assert len(pictures) >= 2
    assert len(files) >= 5
    for path in pictures + files:
        assert (REPOSITORY / path).exists(), path
