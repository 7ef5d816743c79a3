# make run   the main job: check the front page's claims, write page.html
# make test  everything a change must pass: format, lint, types, tests
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
FRONT := immiscible-diffusion/main convergent-learning/recurs-conv1 regret-preference/main
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: env run test lint results readme bench-env bench clean

env: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[dev]'
	touch $@

run: env
	$(BIN)/counterproof check $(FRONT) || [ $$? -eq 1 ]
	$(BIN)/counterproof report --out page.html

lint: env
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The project's own measurements: run every claim, keep its trials under results/, renew the README's table.
results: env
	$(BIN)/counterproof check --all || [ $$? -eq 1 ]
	for card in $$(grep -l '^status: runs' src/counterproof/*/*.md); do \
		slug=$$(sed -n 's/^slug: //p' $$card); \
		$(BIN)/counterproof runs export --paper $$slug --current --out results/$$slug.jsonl || exit 1; \
	done
	$(MAKE) readme

readme: env
	$(BIN)/python -m counterproof.page.readme README.md

# Peers the benchmarks measure against; never needed by the package.
bench-env: .venv/.bench-ready

.venv/.bench-ready: .venv/.ready
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[bench]'
	touch $@

bench: bench-env
	mkdir -p .bench
	for file in benchmarks/[a-z]*.py; do $(BIN)/python $$file --json .bench/$$(basename $$file .py).json || exit 1; done

clean:
	rm -rf .venv .bench page.html .mypy_cache .ruff_cache
