PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# two processes of the test suite share the machine: more threads each only get in each other's way
export OMP_NUM_THREADS ?= 1

.PHONY: demo test style quality bench bench-streaming bench-training docs assets voices clean

demo: $(VENV)/.core  ## a WAV and a transcript from the embedded clip and (random) checkpoint
	@mkdir -p outputs
	$(BIN)/moshi-flax generate --output outputs/demo.wav --max-new-frames 50

test: $(VENV)/.test  ## every test, the equivalence with PyTorch included
	$(BIN)/python -m pytest -n 2

style: $(VENV)/.quality  ## format, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(VENV)/.quality  ## check without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.bench  ## times of generation next to PyTorch and Kyutai's packages; wants an idle machine
	$(BIN)/python utils/benchmark/generate.py

bench-streaming: $(VENV)/.bench  ## the same of endless dialogues and of Mimi frame by frame
	$(BIN)/python utils/benchmark/streaming.py

bench-training: $(VENV)/.test  ## time and memory of the training step next to PyTorch
	$(BIN)/python utils/benchmark/train.py

docs: $(VENV)/.docs  ## the pages of docs/ as a site in site/
	$(BIN)/mkdocs build --strict --quiet

assets: $(VENV)/.test  ## rebuild the embedded checkpoint and clip; needs espeak-ng
	$(BIN)/python utils/build_assets.py

voices:  ## the Debian packages that examples/converse speaks with; needs root
	apt-get install --yes libflite1 espeak-ng

clean:
	rm -rf $(VENV) outputs site

# Stamps: a target's environment is installed once, and again when the requirements change. The core has no torch.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: setup.py pyproject.toml | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) -e ".[test]"
	# Kyutai's own package, the second oracle; without the pins that would replace torch and NumPy
	$(PIP) --no-deps "moshi>=0.2.13,<0.3"
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	# more sides; where there is no wheel of one, the tables say that it is not installed
	-$(PIP) --no-deps "moshi_mlx>=0.3,<0.4" "mlx>=0.32,<0.33" "mlx-cpu>=0.32,<0.33"
	-$(PIP) --no-deps "rustymimi>=0.4.1,<0.5"
	@touch $@

$(VENV)/.quality: | $(VENV)/bin/python
	$(PIP) "ruff>=0.9"
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	$(PIP) -e ".[docs]"
	@touch $@
