# make train and make test do all set-up themselves; the second time they find it done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup train picture test test-parity test-faults test-fuzz lint test-gpu docs clean

help:
	@echo "make train   set up, then train the quickstart on two ranks (runs/quickstart)"
	@echo "make test    set up, then lint, type-check and test"
	@echo "make test-parity   every legal layout of 2 and 4 ranks, and a sample of 8, against one rank"
	@echo "make test-faults   200 faults and more injected into runs: killed and stopped ranks, full disks, damaged files"
	@echo "make test-fuzz     ten thousand odd and damaged files, read as if somebody had sent them"
	@echo "make test-gpu      the kernels and the miniature hybrid on a GPU, and the kernels' benchmark there"
	@echo "make picture train the quickstart without Engram layers too, and draw both curves"
	@echo "make lint    ruff and mypy alone"
	@echo "make docs    the site of the documentation (site/index.html)"
	@echo "make clean   remove the virtual environment and caches; runs/ stays"

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@tools/setup.sh "$(PYTHON)" "$(VENV)"
	@touch $@

train: $(READY)
	$(BIN)/hybridtrain launch --nproc 2 configs/quickstart.toml $(if $(wildcard runs/quickstart/checkpoints/latest),--resume)
	@echo; echo "A sample of the trained model:"
	@$(BIN)/hybridtrain generate runs/quickstart --prompt "The people of the United States" --tokens 100
	@echo; echo "run files: runs/quickstart   (summary.json, metrics.jsonl, settings.toml, checkpoints/)"
	@echo "curves:    $(BIN)/tensorboard --logdir runs/quickstart/tensorboard"

# The quickstart again without its Engram layers, and both curves as the picture of README.
picture: $(READY)
	$(BIN)/hybridtrain launch --nproc 2 configs/quickstart.toml engram.enabled=false run.dir=runs/quickstart-plain \
		$(if $(wildcard runs/quickstart-plain/checkpoints/latest),--resume)
	$(BIN)/python tools/plot_runs.py docs/quickstart.svg runs/quickstart runs/quickstart-plain --label "with Engram" --label "without"
	@$(BIN)/python tools/plot_runs.py --table runs/quickstart runs/quickstart-plain

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q

test-parity: $(READY)
	$(BIN)/python -m pytest -q -m parity

test-faults: $(READY)
	$(BIN)/python -m pytest -q -m faults

test-fuzz: $(READY)
	FUZZ=many $(BIN)/python -m pytest -q tests/fuzz

test-gpu: $(READY)
	@$(BIN)/python -c "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 'no CUDA device here: make test-gpu needs one GPU')" || exit 2
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -q -m gpu
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -q $(wildcard tests/kernels/*/test_*kernel.py tests/kernels/*/test_fp8.py)
	$(BIN)/hybridtrain kernels bench

# What builds the site is installed by this target alone, the first time and when its versions change.
docs: $(READY) $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site: site/index.html"

$(VENV)/.docs: requirements-docs.lock
	$(BIN)/python -m pip --disable-pip-version-check install -q -r requirements-docs.lock -c requirements.lock
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
