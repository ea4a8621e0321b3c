# make demo | make test need nothing but Python >= 3.11 and make: they set up .venv by themselves.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RECIPE ?= recipes/quickstart.yaml
# One thread a process: tests run in parallel, and two thread pools on two cores slow each other down.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
# Idle threads sleep instead of spinning, so that other work on the machine does not stall training.
RUN_ENV := OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0

.PHONY: demo test test-export test-flower test-postgres test-quantize lint types format venv venv-dev clean help

help:
	@echo "make demo    set up, then pretrain, grow, adapt, release and report small models"
	@echo "make test    set up, then run the test suite     make test-export  the peers' runtimes"
	@echo "make test-postgres  the registry on a PostgreSQL of its own, where one is installed"
	@echo "make test-flower  federations on Flower, races on Ray   make test-quantize  int8 by torchao"
	@echo "make lint    ruff        make types   mypy        make format  ruff format"
	@echo "make venv    set up only              make clean   remove .venv and caches"

demo: venv
	$(RUN_ENV) $(BIN)/samara run $(RECIPE)
	@echo "The report: runs/quickstart/report.html"

test: venv-dev
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --ignore $(SERVERS) $(ARGS)

# The runtimes that read what we export; llama-cpp-python builds from source for some minutes.
LLAMA_CPP := -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
	-DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF

test-export: venv-dev
	CMAKE_ARGS="$(LLAMA_CPP)" $(PIP_INSTALL) -e '.[export]'
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 tests/export $(ARGS)

METHODS_ON_FLOWER := tests/integration/federated/test_flower_methods.py
# Starts servers as a user would, and waits for them: minutes, where flwr is installed.
SERVERS := tests/integration/federated/test_superlink.py

# What runs on Flower and Ray: half a gigabyte that the rest does not need.
test-flower: venv-dev
	$(PIP_INSTALL) -e '.[federated,parallel]'
	@# A process each: Ray's end, once in a while, takes the process along that started it twice.
	for part in tests/integration/federated/test_flower.py $(SERVERS) \
		tests/integration/federated/test_nodes.py \
		tests/integration/federated/test_flower_privacy.py tests/unit/growth/test_executor.py \
		tests/integration/test_grow.py::test_ray_gives_the_same_run \
		tests/unit/federated/test_server_optimizers.py \
		$(addprefix $(METHODS_ON_FLOWER)::test_,hetlora fedadapter sparse full); do \
		$(TEST_ENV) FLWR_TELEMETRY_ENABLED=0 RAY_USAGE_STATS_ENABLED=0 \
			$(BIN)/python -m pytest $$part $(ARGS) || exit 1; \
	done

# Beside the environment: transformers would load torchao in every process.
QUANTIZE := .venv/quantize

test-quantize: venv-dev
	$(PIP_INSTALL) --no-deps --upgrade --target $(QUANTIZE) torchao
	PYTHONPATH=$(QUANTIZE) $(TEST_ENV) $(BIN)/python -m pytest tests/unit/model/test_quantization.py \
		tests/integration/test_generate.py $(ARGS)

test-postgres: venv-dev
	$(PIP_INSTALL) -e '.[registry,postgres]'
	$(TEST_ENV) $(BIN)/python tests/postgres.py $(BIN)/python -m pytest tests/unit/registry $(ARGS)

lint: venv-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv-dev
	$(BIN)/mypy

format: venv-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: .venv/installed
venv-dev: .venv/installed-dev

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP_INSTALL) -e '.[data,tracking,evaluate,adapt,registry,sign,privacy,dev]'
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
