# Set-up happens by itself: every target creates .venv and installs the pins if they are missing.
#
# A machine without a GPU wants torch's CPU build. Where the package index in use does not offer
# it, name one that does: make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
RUN := runs/quickstart
TOKENIZER := data/python-tokenizer.json
STDLIB = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')

.PHONY: quickstart test lint test-slow test-cluster clean

# DeepSpeed's own build reads torch, so torch comes first and isolation is off for it.
$(STAMP): requirements.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "megagpt needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

# Raw text -> tokenizer -> shards -> training on two ranks -> curves -> generated text.
quickstart: $(STAMP) $(TOKENIZER)
	$(BIN)/python data_prep/python_stdlib.py --output data/python-stdlib --tokenizer $(TOKENIZER)
	$(BIN)/deepspeed --num_gpus 2 --module megagpt.train launch/runs/quickstart.toml
	@echo && echo "The curves as a picture and as a page:"
	$(BIN)/megagpt report $(RUN)
	@echo && echo "A sample:"
	$(BIN)/megagpt generate $(RUN) --prompt "$$(printf 'class Parser:\n    def __init__(self')" --max-tokens 160 --temperature 0.6 --top-k 50 --seed 3

# GPT-2's vocabulary has no token for an indentation; 4,096 tokens of our own read Python better.
$(TOKENIZER): | $(STAMP)
	$(BIN)/python data_prep/train_tokenizer.py "$(STDLIB)/*.py" --format text --vocab-size 4096 --output $@

# One core for each of two workers; a test that starts several ranks shares its worker's.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 3600

# Over virtual hosts with ssh and SLURM: docs/clusters.md says what they need.
test-cluster: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster -rs tests/virtual

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build megagpt.egg-info .pytest_cache .mypy_cache .ruff_cache
