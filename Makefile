# Every target works from a fresh clone: what a target needs is installed into .venv first. `make help` lists them.
#
#   PYTHON       the Python to make .venv with (3.11 or later); default python3
#   WORKERS      processes that run tests, about 1.5 GB each; default 2
#   TORCH_INDEX  where to get torch from, such as https://download.pytorch.org/whl/cpu; default: pip's own index

PYTHON ?= python3
WORKERS ?= 2
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

VLLM := .venv-vllm/bin
VLLM_PIP := $(VLLM)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-slow test-all test-vllm compat check format bench clean distclean

help: ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: .venv/installed-dev ## Install Overture and the developer tools into .venv.

demo: .venv/installed ## Tune a few prompts on the embedded model and write demo_out/.
	$(BIN)/overture demo --out demo_out

test: .venv/installed-dev ## Run the tests, without the slow ones.
	$(PYTEST) -m "not slow"

test-slow: .venv/installed-dev ## Run the slow ones: with them, all.
	$(PYTEST) -m slow

test-all: .venv/installed-dev ## Run all tests.
	$(PYTEST)

test-vllm: .venv-vllm/installed ## Run the tests of Overture in vLLM, in an environment of their own (.venv-vllm, 4 GB).
	$(VLLM)/python -m pytest -q tests/vllm -W default

compat: .venv/installed-dev ## Run the whole compatibility matrix and write docs/compatibility.md from it.
	mkdir -p build
	$(BIN)/python -m pytest -q tests/matrix/test_matrix.py --compat build/compat.json
	$(BIN)/python -m tests.matrix.document build/compat.json --date "$$(date +%F)" > build/compatibility.md
	mv build/compatibility.md docs/compatibility.md

check: .venv/installed-dev ## Check format, lint, types and the direction of imports.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: .venv/installed-dev ## Rewrite the source in the project's format.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/installed-dev ## Run the scripts in benchmarks/; with DATA=DIR those, too, that read data.
	@failed=; for script in benchmarks/*.py; do \
		python=$(BIN)/python; set --; \
		case $$script in \
			*/index.py) continue;; \
			*/vllm_*) python=.venv-vllm/bin/python; \
				[ -e $$python ] || { echo "==> $$script: left out, make test-vllm installs vLLM"; continue; };; \
		esac; \
		if grep -q '"--data"' "$$script"; then \
			[ -n "$(DATA)" ] || { echo "==> $$script: left out, it reads DATA=DIR"; continue; }; \
			set -- --data "$(DATA)"; \
		fi; \
		echo "==> $$script"; "$$python" "$$script" "$$@" || failed="$$failed $$script"; \
	done; \
	if [ -n "$(DATA)" ]; then \
		for step in "run --backbone tiny" "run --backbone minilm" report; do \
			echo "==> benchmarks.quality.$$step"; \
			$(BIN)/python -m benchmarks.quality.$$step --data "$(DATA)" || failed="$$failed quality"; \
		done; \
	fi; \
	$(BIN)/python benchmarks/index.py; \
	[ -z "$$failed" ] || { echo "Failed:$$failed"; exit 1; }

clean: ## Remove what the tools and the demo wrote.
	rm -rf demo_out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find overture tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv and .venv-vllm, too.
	rm -rf .venv .venv-vllm

# torch comes first and alone: asked for together with the rest, pip may settle on another build of it.
.venv/torch: constraints.txt
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
			echo "Overture needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not found)." >&2; \
			echo "Name another: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }; \
		echo "==> Making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear .venv; }
	@$(repair)
	@echo "==> Installing $(TORCH) (a few hundred MB; this can take a few minutes)"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	@touch $@

.venv/installed: .venv/torch pyproject.toml
	@$(repair)
	@echo "==> Installing Overture and its libraries (a minute or two)"
	@$(PIP) -e .
	@touch $@

.venv/installed-dev: .venv/installed
	@$(repair)
	@echo "==> Installing the developer tools (a minute or two)"
	@$(PIP) -e '.[dev]'
	@touch $@

# vLLM asks for packages that Overture's other libraries exclude, hence an environment of its own; see constraints-vllm.txt.
.venv-vllm/installed: constraints-vllm.txt pyproject.toml
	@echo "==> Making .venv-vllm and installing vLLM (three minutes or more)"
	@[ -x $(VLLM)/python ] || $(PYTHON) -m venv .venv-vllm
	@$(VLLM_PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	@$(VLLM_PIP) --no-deps -r constraints-vllm.txt
	@$(VLLM_PIP) --no-deps -e .
	@touch $@

# pip writes INSTALLER after a package's files. Without it an install was cut short, and pip must not think it is there.
repair = for package in .venv/lib/python3*/site-packages/*.dist-info; do \
	[ ! -d "$$package" ] || [ -e "$$package/INSTALLER" ] || { \
	echo "==> Removing the half-installed $$(basename $$package .dist-info)"; rm -rf "$$package"; }; done
