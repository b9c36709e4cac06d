# Two commands: `make demo` runs the main job on real models, `make test` checks everything.
# Each sets itself up in $(VENV) on a fresh machine.

PYTHON ?= python3
VENV ?= .venv
# On machines without a GPU a CPU build of torch serves; any torch >= 2.6 does:
# make demo TORCH="torch --index-url ..."
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo chemistry suite-vision suite-text ablations test lint unit kernels wheel smoke peers report clean

demo: $(READY)  ## merge four experts of a text encoder by every method, score them, draw the result
	$(BIN)/python examples/demo.py

chemistry: $(READY)  ## merge a published chemistry BERT with its two published fine-tunes
	$(BIN)/python examples/chemistry.py

suite-vision: $(READY)  ## train six experts of a mini ViT, merge them by every method over three seeds
	$(BIN)/python benchmarks/quality/run.py vision --seeds 3

suite-text: $(READY)  ## the same for four full fine-tunes of a sentence encoder
	$(BIN)/pip install --quiet --editable ".[suites]"
	$(BIN)/python benchmarks/quality/run.py text --seeds 3

ablations: $(READY)  ## what each choice of the method is worth; needs the result of suite-vision
	$(BIN)/python benchmarks/quality/ablate.py --all
	$(BIN)/python benchmarks/quality/figures.py

test: lint unit kernels wheel smoke  ## everything that runs without a GPU

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/report.py --check

unit: $(READY)
	$(BIN)/pytest -m "not gpu" --ignore tests/kernels

kernels: $(READY)  ## Triton kernels in the interpreter, in a process of their own
	TRITON_INTERPRET=1 $(BIN)/pytest -m "not gpu" tests/kernels

wheel: $(READY)  ## build the wheel in isolation, compare its contents with the tree
	rm -rf build/wheel
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/python tests/check_wheel.py build/wheel

smoke: $(READY)  ## the main job, small
	$(BIN)/python examples/demo.py --quick

peers: $(READY)  ## tests against mergekit, fusion-bench and ray, which it installs beside $(VENV)
	$(BIN)/python tests/peers.py

report: $(READY)  ## regenerate the tables of the README from committed results
	$(BIN)/python benchmarks/report.py

$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output
