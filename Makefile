# make demo    from nothing to a served one-step image, on a laptop
# make test    lint, types, import contracts, tests
# make compare ten objectives side by side; some hours on 2 cores, and it goes on where it was cut short
# make env     only the environment;   make lint, make soak, make soak-deps, make bench, make lock: see CONTRIBUTING.md

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPARISON := build/compare
DATA ?= shapes
FASHION := build/fashion
FASHION_FILES ?= /usr/share/datasets/fashion-mnist
FASHION_CLASSES := T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag 'Ankle boot'
# Keeps glibc from returning large temporaries to the system at every step: 3 to 10 times faster on CPUs. One arena, because
# the thresholds only apply to the first, and Ray calls its workers' code from other threads.
FAST_MALLOC := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456 \
    MALLOC_ARENA_MAX=1

.PHONY: docs demo compare compare-shapes compare-fashion test env lint soak soak-deps gpu bench lock clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	@$(FAST_MALLOC) $(BIN)/python -m pipelines.demo

# Compares methods on drawn shapes, or with DATA=fashion on Fashion-MNIST (apt-get install dataset-fashion-mnist).
# Resumes an interrupted comparison: images, latents, trainings and evaluations of earlier calls are kept.
compare: compare-$(DATA)

compare-shapes: $(STAMP)
	@test -f $(COMPARISON)/images/drawn || { \
	    $(BIN)/python -m pipelines.demo.images --output $(COMPARISON)/images && touch $(COMPARISON)/images/drawn; }
	@test -f $(COMPARISON)/latents/manifest.json || \
	    $(FAST_MALLOC) $(BIN)/python -m pipelines.encode --images $(COMPARISON)/images/train \
	        --output $(COMPARISON)/latents --vae pipelines/demo/autoencoder_weights --image-size 64
	@$(FAST_MALLOC) $(BIN)/python -m pipelines.compare --data $(COMPARISON)/latents \
	    --train-images $(COMPARISON)/images/train --held-out-images $(COMPARISON)/images/val \
	    --judge pipelines/demo/judge_weights --output $(COMPARISON)/comparison

compare-fashion: $(STAMP)
	@test -d $(FASHION_FILES) || \
	    { echo "error: no $(FASHION_FILES); apt-get install dataset-fashion-mnist, or set FASHION_FILES" >&2; exit 2; }
	@test -f $(FASHION)/images/class_names.txt || { mkdir -p $(FASHION)/images && cp $(FASHION_FILES)/*-ubyte.gz $(FASHION)/images && \
	    printf '%s\n' $(FASHION_CLASSES) > $(FASHION)/images/class_names.txt; }
	@test -f $(FASHION)/latents/manifest.json || \
	    $(BIN)/python -m pipelines.encode --images '$(FASHION)/images/train-*' --output $(FASHION)/latents \
	        --vae pixels --image-size 28 --no-mirror --images-per-shard 5000
	@test -f $(FASHION)/judge/README.md || \
	    $(FAST_MALLOC) $(BIN)/python -m pipelines.judge --images '$(FASHION)/images/train-*' \
	        --held-out-images '$(FASHION)/images/t10k-*' --output $(FASHION)/judge --image-size 28 \
	        --batch-size 128 --num-steps 5000
	@$(FAST_MALLOC) $(BIN)/python -m pipelines.compare --data $(FASHION)/latents \
	    --train-images '$(FASHION)/images/train-*' --held-out-images '$(FASHION)/images/t10k-*' \
	    --judge $(FASHION)/judge --output $(FASHION)/comparison \
	    --adapt meanflow_core.presets.real_images:on_fashion --num-steps 3000

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "error: $(PYTHON) must be Python 3.11 or newer, but is $$($(PYTHON) -V); set PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --editable ".[dev]"
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(FAST_MALLOC) $(BIN)/python -m pytest -m "not soak"

soak: $(STAMP)
	$(FAST_MALLOC) $(BIN)/python -m pytest -m soak --timeout 3600

# Installs what some soak tests need: a browser and PostgreSQL from Debian's packages, and their drivers. Requires root.
soak-deps: $(STAMP)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --editable ".[dev,browser,docs,server]"
	apt-get update && apt-get install --yes --no-install-recommends chromium postgresql

# On a machine with a GPU. --toy tries the script on a CPU.
gpu: $(STAMP)
	$(BIN)/python tests/benchmarks/gpu --json build/gpu.json --markdown build/gpu.md

# The site, in build/docs. Warnings are errors.
docs: $(STAMP)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off --editable ".[docs]"
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

bench: $(STAMP)
	@mkdir -p build/bench
	@set -e; for script in tests/benchmarks/[!_]*.py; do \
	    name=$$(basename $$script .py); echo "== $$name"; \
	    $(FAST_MALLOC) $(BIN)/python $$script --json build/bench/$$name.json; \
	done

# Resolves all dependencies again, and writes exact public versions.
lock: $(STAMP)
	$(BIN)/python .ci/lock.py constraints.txt

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
