# Everything starts from a bare machine with Python 3.12 and a compiler; `.venv` holds all that is installed.
BIN := .venv/bin
INSTALLED := .venv/.installed
LEROBOT_PLUGIN := plugins/lerobot_policy_omega_qvla
# Extra arguments for pytest, e.g. `make test-fast ARGS="-x tests/numerics"`.
ARGS :=
# A process a core, each with whole files: what a file's tests share is made once. `IN_PARALLEL=` for a debugger.
IN_PARALLEL := --numprocesses=logical --maxprocesses=8 --dist=loadfile

.PHONY: help install rendering browser demo test test-fast lint clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 12

install: $(INSTALLED) rendering ## make .venv with the pinned dependencies

$(INSTALLED): pyproject.toml constraints.txt $(wildcard csrc/*) $(LEROBOT_PLUGIN)/pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || \
		{ python=$$(scripts/find-python) && "$$python" -m venv --clear .venv; }
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[groot,metaworld,ray,bench,serving,hub,dev]' -e $(LEROBOT_PLUGIN) \
		-c constraints.txt
	@# For tests, without what they ask for: the client of openpi's servers (an older NumPy than everything else), and
	@# LIBERO's task definitions and initial states (a large simulator that has nothing to show without its meshes).
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps openpi-client hf-libero -c constraints.txt
	@touch $@

rendering: $(INSTALLED)
	@scripts/install-rendering

browser:
	@scripts/install-browser

demo: install ## quantize the bundled policy and let it act
	$(BIN)/omega-qvla demo

test: install browser ## all tests
	$(BIN)/python -m pytest $(IN_PARALLEL) $(ARGS)

test-fast: install ## the inner loop: all tests that are not slow
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow" $(ARGS)

lint: $(INSTALLED) ## style, format, types and who imports whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## remove caches and build outputs; .venv and runs stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
