# Two commands to be up: `make demo` and `make test`. Both first make the virtual environment .venv, unless it is there.
#
#   PYTHON=python3.12 make test     another interpreter (3.11 or 3.12) for the environment
#   make test JOBS=4                files of tests that run at a time; each takes a core and about a gigabyte
#
# A torch that is in range (TORCH_RANGE) is kept, in .venv or in the interpreter .venv is made from; else the pinned one is installed.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp
TORCH_RANGE = $(shell sed -n 's/^ *"torch\(.*\)",$$/\1/p' pyproject.toml)

.PHONY: demo test test-slow check format bench benchmark docs clean help
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## the whole system on a built-in world: data, training, store, ranking, table, report
	$(BIN)/vista demo

test: $(STAMP) ## all tests but the slow ones
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: $(STAMP) ## the slow tests alone
	$(BIN)/python -m pytest -m slow

check: $(STAMP) ## lint, formatting, types, and whether the documents tell the truth
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_docs.py tests/test_architecture.py

format: $(STAMP) ## rewrite the code the way check wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## make docs/cli.md anew from the commands
	$(BIN)/python -m vista.cli.reference > docs/cli.md.partial
	mv docs/cli.md.partial docs/cli.md

bench: $(STAMP) ## every script of bench/, in its small setting
	@set -e; for script in bench/*.py; do echo "== $$script"; $(BIN)/python $$script; done

benchmark: $(STAMP) ## what docs/benchmark.md says, anew, below ./benchmark: MACPORTS=a clone of macports-ports, MOVIELENS=ml-1m (else downloaded); hours
	@test -n "$(MACPORTS)" || { echo "where is the log? MACPORTS=FOLDER: a clone of macports-ports, or a converted copy" >&2; exit 2; }
	$(BIN)/vista benchmark lifelong --config configs/benchmark/macports.toml --from "$(MACPORTS)" --out benchmark/macports
	$(BIN)/vista benchmark lifelong --config configs/benchmark/ml-1m.toml $(if $(MOVIELENS),--from "$(MOVIELENS)") --out benchmark/ml-1m
	$(BIN)/vista benchmark lifelong --config configs/benchmark/remembering.toml --out benchmark/remembering
	$(BIN)/vista benchmark lifelong --config configs/benchmark/many-things.toml --out benchmark/many-things

clean: ## remove what tests, builds and the demo left; .venv stays
	rm -rf build dist demo runs .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	find src tests examples bench -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt .ci/install
	.ci/install "$(PYTHON)" "$(VENV)" "$(TORCH_RANGE)"
	@touch $@
