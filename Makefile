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
# A CPU without products in bf16 takes some thirty times as long for them as in fp32.
QUICKSTART_DTYPE = $(shell $(BIN)/python -c 'from megagpt.model.kernels.attention import BF16_PRODUCTS; print("bf16" if BF16_PRODUCTS else "fp32")')
TOKENIZER := data/python-tokenizer.json
STDLIB = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')

# `make gpu-check`: what it measures and how is in docs/benchmarks/gpu.md. On a CPU with DEVICE=cpu.
DEVICE ?= cuda
GPU_CHECK_ITEMS ?=
LIMIT_S ?= 0
COMMIT ?=
GPU_OUT ?= .gpu/out
NANOGPT ?= $(wildcard .gpu/pack/nanogpt)
GPU_VENV := $(if $(filter cpu,$(DEVICE)),$(VENV),.gpu/venv)

.PHONY: install quickstart test lint test-slow test-cluster docs gpu-pack gpu-check clean

# DeepSpeed's own build reads torch, so torch comes first and isolation is off for it.
$(STAMP): requirements.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "megagpt needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "Installing into $(VENV), once: PyTorch, then DeepSpeed and the rest. Some minutes, mostly silent."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

install: $(STAMP)
	@echo "Installed. In every new shell: source $(VENV)/bin/activate"

# Raw text -> tokenizer -> shards -> training on two ranks -> curves -> generated text.
quickstart: $(STAMP) $(TOKENIZER)
	$(BIN)/python data_prep/python_stdlib.py --output data/python-stdlib --tokenizer $(TOKENIZER)
	$(BIN)/deepspeed --num_gpus 2 --module megagpt.train launch/runs/quickstart.toml parallel.dtype=$(QUICKSTART_DTYPE)
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

# Over virtual hosts with ssh and SLURM: docs/how-to/clusters.md says what they need.
test-cluster: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "cluster and not slow" -rs tests/virtual

# Wheels that a machine with a GPU and no network lacks, into .gpu/pack; run where there is one.
gpu-pack: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_check.pack $(if $(NANOGPT),--nanogpt $(NANOGPT))

gpu-check: $(GPU_VENV)/installed
	$(GPU_VENV)/bin/python -m benchmarks.gpu_check $(GPU_CHECK_ITEMS) --device $(DEVICE) \
		--limit-s $(LIMIT_S) --output $(GPU_OUT) --commit "$(COMMIT)" --nanogpt "$(NANOGPT)"

# The machine's own Python with its torch, and the wheels above it. Where that Python is itself in
# a virtual environment, system site packages are not its own: a .pth file names them.
.gpu/venv/installed: $(wildcard .gpu/pack/wheels/*.whl)
	$(PYTHON) -m venv --system-site-packages --without-pip .gpu/venv
	purelib='import sysconfig; print(sysconfig.get_paths()["purelib"])'; \
		$(PYTHON) -c "$$purelib" > "$$(.gpu/venv/bin/python -c "$$purelib")/machine.pth"
	test -z "$^" || $(PYTHON) -m pip --python .gpu/venv/bin/python install --quiet --no-index --no-deps --ignore-installed $^
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The pages of docs/reference that are written from the code.
docs: $(STAMP)
	for page in reference/test_commands_page reference/test_messages_page config/test_reference; do \
		$(BIN)/python -m tests.$$(echo $$page | tr / .) || exit 1; done

clean:
	rm -rf $(VENV) build megagpt.egg-info .pytest_cache .mypy_cache .ruff_cache
