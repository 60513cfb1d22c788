PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# exact versions, the same for everyone; setup.py has the ranges that they are chosen from
TESTED := --constraint requirements/tested.txt --constraint requirements/peers.txt
PIP := $(BIN)/python $(PIP_INSTALL) $(TESTED)
COMPILE := $(BIN)/uv pip compile --quiet --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_35
UPGRADE ?=
# a part of every room: numbers against PyTorch, files, options, what is traced; no whole generation, dialogue or training
FAST := -m "not slow" tests/ops tests/nn tests/checkpoints/test_rules.py tests/checkpoints/test_files.py \
	tests/generation/test_logits_process.py tests/generation/test_configuration.py tests/models/moshi/test_modules.py \
	tests/training/test_configuration.py tests/training/data/test_alignment.py tests/cli/test_pacing.py \
	tests/cli/test_transcript.py tests/cli/test_mistakes.py tests/test_docs.py tests/test_input_checks.py \
	tests/test_package.py tests/test_promotion.py tests/test_requirements.py
# two processes of the test suite share the machine: more threads each only get in each other's way
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-fast test-newest test-oldest style quality bench bench-streaming bench-training docs assets voices embedded requirements wheel-check clean

demo: $(VENV)/.demo  ## three recorded questions, answered live by the embedded model: printed, as a WAV and as a picture
	@mkdir -p outputs
	$(BIN)/moshi-flax demo --output outputs/demo.wav --picture outputs/demo.png --overwrite

# a file's tests stay in one process, where they share what they compile
test: $(VENV)/.test  ## every test, the equivalence with PyTorch included
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(VENV)/.test  ## a part of every room, for the inner loop
	$(BIN)/python -m pytest -n 2 $(FAST)

test-newest:  ## what is fast, with the newest versions that setup.py allows, in an environment of its own
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python $(PIP_INSTALL) -e ".[test]"
	.venv-newest/bin/python $(PIP_INSTALL) --no-deps "$$(grep ^moshi== requirements/peers.txt)"
	.venv-newest/bin/python -m pytest -n 2 $(FAST)

test-oldest:  ## the same with the oldest
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python $(PIP_INSTALL) --constraint requirements/oldest.txt -e ".[test]"
	.venv-oldest/bin/python $(PIP_INSTALL) --no-deps "$$(grep ^moshi== requirements/peers.txt)"
	.venv-oldest/bin/python -m pytest -n 2 $(FAST)

style: $(VENV)/.quality  ## format, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(VENV)/.quality  ## check without changing anything: style, who imports whom, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(VENV)/.bench  ## times of generation next to PyTorch and Kyutai's packages; wants an idle machine
	$(BIN)/python utils/benchmark/generate.py

bench-streaming: $(VENV)/.bench  ## the same of endless dialogues and of Mimi frame by frame
	$(BIN)/python utils/benchmark/streaming.py

bench-training: $(VENV)/.test  ## time and memory of the training step next to PyTorch
	$(BIN)/python utils/benchmark/train.py

docs: $(VENV)/.docs  ## the pages of docs/ as a site in site/
	$(BIN)/mkdocs build --strict --quiet

assets: $(VENV)/.test  ## rebuild the random checkpoint of the tests; needs espeak-ng
	$(BIN)/python utils/build_assets.py

voices:  ## the Debian packages that examples/converse speaks with; needs root
	apt-get install --yes libflite1 espeak-ng

embedded: $(VENV)/.test  ## train the model that converses, from nothing; hours, goes on where it was interrupted; after `make voices`
	$(BIN)/python -m examples.converse.embedded

# newer versions come in by `make requirements UPGRADE=--upgrade`; without, only what the ranges no longer allow changes
requirements: $(VENV)/.quality  ## write the lists of exact versions in requirements/ from the ranges in setup.py
	$(COMPILE) $(UPGRADE) setup.py --extra all --output-file requirements/tested.txt
	$(COMPILE) $(UPGRADE) --no-deps requirements/peers.in --output-file requirements/peers.txt
	$(COMPILE) $(UPGRADE) setup.py --extra all --resolution lowest-direct --output-file requirements/oldest.txt

# away from the sources, so that what is tried is what a wheel brings
wheel-check:  ## build the wheel, install it alone in an environment of its own, and run it there
	rm -rf build dist .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	.venv-wheel/bin/python $(PIP_INSTALL) $(TESTED) dist/*.whl
	cd .venv-wheel && bin/moshi-flax generate --output demo.wav --max-new-frames 5 && test -s demo.wav

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-wheel build dist outputs site

# Stamps: a target's environment is installed once, and again when the requirements change. The core has no torch.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: setup.py pyproject.toml requirements/tested.txt requirements/peers.txt | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.demo: $(VENV)/.core
	$(PIP) -e ".[picture]"
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) -e ".[test]"
	# Kyutai's own package, the second oracle; without the pins that would replace torch and NumPy
	$(PIP) --no-deps moshi
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	# more sides; where there is no wheel of one, the tables say that it is not installed
	-$(PIP) --no-deps moshi_mlx mlx mlx-cpu
	-$(PIP) --no-deps rustymimi
	@touch $@

$(VENV)/.quality: $(VENV)/.core
	$(PIP) -e ".[quality,train]"
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	$(PIP) -e ".[docs]"
	@touch $@
