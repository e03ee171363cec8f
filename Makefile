# Everything happens in .venv, from package registries alone. `make demo` and `make test` need only Python >= 3.10,
# a C++ compiler and make.
# Compiled modules are kept, whatever the shell says: the tests start a hundred processes.
export PYTHONDONTWRITEBYTECODE :=
PYTHON ?= python3
BIN := .venv/bin
TORCH := 2.13.0

.PHONY: demo play test docs soak sanitize lint build bench clean

build: .venv/built

demo: build
	$(BIN)/inferix generate --model tiny --seconds 60 --seed 6 --actions random \
	    --prompt-file examples/tour.txt --out demo.mp4

# Steer the tiny world in the browser; the address is printed. PORT=8001 make play, if 8000 is taken.
PORT ?= 8000
play: build
	$(BIN)/inferix play --model tiny --seed 6 --port $(PORT)

# Three files of tests at a time, as some of them wait, in the order of tests/conftest.py: the longest first. One thread each: the tests' operations are
# too small for two, and torch's threads get in each other's way on a busy machine.
test: .venv/tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

# Hours of hostile use, seeded: each command prints what was tried, and fails if anything did not hold. On a CPU core of its
# own, without a GPU: kills and damaged checkpoints take ten minutes each, a world of 5,000 blocks 25 on each of its three
# ways; on a busy machine several times that.
soak: .venv/tools
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.soak_store --steps 100000 --seed 0
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.soak_snapshots --count 2000 --seed 0
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.soak_kills --times 100 --seed 0
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.soak_checkpoints --times 2000 --seed 0
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.soak_hopper --count 20 --seed 1
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.soak_viewers --seconds 120 --seed 0
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.soak_world --blocks 5000 --seed 0 --through process
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.soak_world --blocks 5000 --seed 0 --through worker
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.soak_world --blocks 5000 --seed 0 --through server

# The C++ kernels at every level of instructions, under the address and undefined-behaviour sanitizers.
sanitize: .venv/tools
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.ops.sanitize

lint: .venv/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The API reference from the docstrings, as HTML: build/docs/index.html.
REFERENCE := inferix_kernels '!inferix_kernels[.].*' inferix_kernels.store.memory \
    inferix_kernels.store.snapshot inferix_kernels.quantize inferix.profile '!inferix[.]profile[.].*' inferix.world inferix.models '!inferix[.]models[.].*' \
    $(addprefix inferix_kernels.distributed.,transport in_process process_group faults) \
    $(addprefix inferix.commands.,configs generate play convert evaluate evaluate_pair evaluate_dataset doctor) \
    $(addprefix inferix.evaluate.,metric drift judging weights pair perceptual dataset)
docs: .venv/docs
	$(BIN)/python -W "ignore:Error parsing type annotation" -m pdoc --docformat google -o build/docs $(REFERENCE)

bench: build
	$(BIN)/python -m benchmarks run

clean:
	rm -rf .venv build *.egg-info inferix_kernels/_*.so

# What this project was called before, and what another on PyPI is: its files would lie over these.
FORGET := $(BIN)/pip uninstall -q -y inferix 2>/dev/null || true

# pip's default torch for Linux is the CUDA build, several gigabytes: without a GPU, take the CPU build where there is one.
.venv/torch:
	$(PYTHON) -m venv .venv || { echo "make: $(PYTHON) cannot make a virtual environment (on Debian: apt install python3-venv)"; exit 1; }
	command -v nvidia-smi >/dev/null || $(BIN)/pip install -q torch==$(TORCH)+cpu 2>/dev/null || $(BIN)/pip install -q torch==$(TORCH)
	command -v nvidia-smi >/dev/null && $(BIN)/pip install -q torch==$(TORCH) || true
	touch $@

SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

.venv/built: .venv/torch $(SOURCES)
	$(BIN)/pip install -q setuptools pybind11 cmake ninja
	$(FORGET)
	$(BIN)/pip install -q torch==$(TORCH) --no-build-isolation -e '.[stream]'
	touch $@

.venv/docs: .venv/built
	$(BIN)/pip install -q torch==$(TORCH) --no-build-isolation -e '.[stream,docs]'
	touch $@

# With what only the tests need: among it Triton, whose interpreter checks our GPU kernels without a GPU.
.venv/tools: .venv/torch $(SOURCES)
	$(BIN)/pip install -q setuptools pybind11 cmake ninja
	$(FORGET)
	$(BIN)/pip install -q torch==$(TORCH) --no-build-isolation -e '.[test,lint]'
	touch .venv/built $@
