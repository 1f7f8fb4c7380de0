"""Publishes a generator to a stand-in of a hub by the documented command, and loads it from there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meanflow_core.generator import load_pipeline, save_generator
from tests.support.hub import start_hub
from tests.support.readme import REPOSITORY, commands

CLOTHES = REPOSITORY / "docs" / "gallery" / "clothes"
IMAGE = "pipeline(class_labels=[3], seeds=[7], num_inference_steps=1).images[0].tobytes().hex()"
# By this package, from an hf:// address, as `meanflow serve` and `evaluate` load it; and by diffusers alone.
FROM_HUB = f"""
from deploy.models import fetch_generator
from meanflow_core.generator import load_pipeline
pipeline = load_pipeline(fetch_generator("hf://NAME/xl2", None)[0])
print({IMAGE})
"""
BY_DIFFUSERS_ALONE = f"""
import sys
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("NAME/portable", trust_remote_code=True)
assert not any(name.startswith(("meanflow_core", "pipelines", "deploy")) for name in sys.modules)
print({IMAGE})
"""


@pytest.fixture(scope="module")
def expected() -> str:
    pipeline = load_pipeline(CLOTHES)
    return pipeline(class_labels=[3], seeds=[7], num_inference_steps=1).images[0].tobytes().hex()


def test_published_generator_gives_the_same_images_and_keeps_its_model_card(tmp_path, expected):
    save_generator(load_pipeline(CLOTHES), tmp_path / "portable", portable=True)
    upload, serve = commands("publish", "docs/how-to/convert.md")
    words = upload.replace("runs/xl2/generator", str(CLOTHES)).split()
    assert serve.endswith("hf://NAME/xl2")
    with start_hub() as (address, repositories):
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_OFFLINE": "0", "TMPDIR": str(tmp_path)}

        def run(words: list[str]) -> str:
            done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        hf = str(Path(sys.executable).with_name("hf"))
        run([hf, *words[1:]])
        run([hf, "upload", "NAME/portable", str(tmp_path / "portable")])
        files = {str(path.relative_to(CLOTHES)) for path in CLOTHES.rglob("*") if path.is_file()}
        assert set(repositories["NAME/xl2"]) == files
        assert repositories["NAME/xl2"]["README.md"] == (CLOTHES / "README.md").read_bytes()
        assert run([sys.executable, "-c", FROM_HUB]).split()[-1] == expected
        assert run([sys.executable, "-c", BY_DIFFUSERS_ALONE]).split()[-1] == expected
