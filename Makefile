# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test benchmark clean

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,test]'
	touch $@

# The peers, as pyproject.toml lists them and constraints.txt pins them; why without dependencies is said there.
$(VENV)/.benchmark: $(VENV)/.test
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['benchmark'], sep='\n')" > $@.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --requirement $@.txt
	touch $@

# Fits plain LoRA, MAP and mean field on the embedded task, and writes runs/demo/report.html.
demo: $(VENV)/.demo
	$(BIN)/pyrolora compare models/minilm-commonsense.yaml --guides MAP MeanField --seeds 1 --output runs/demo
	@echo "Open runs/demo/report.html in a browser."

test: $(VENV)/.test
	$(BIN)/ruff format --check pyrolora tests tutorials
	$(BIN)/ruff check pyrolora tests tutorials
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

# Costs as ratios to plain PEFT LoRA, and how they grow; runs/benchmark/table.md. About half an hour.
benchmark: $(VENV)/.benchmark
	$(BIN)/python tests/benchmarks/benchmark.py --output runs/benchmark

clean:
	rm -rf $(VENV) runs build *.egg-info
