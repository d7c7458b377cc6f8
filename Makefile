# Set-up, the demo and the checks. Every target sets up what it needs: a virtual environment in .venv with the
# pinned versions of constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
RLHF   := $(VENV)/bin/rlhf
READY  := $(VENV)/.ready

.PHONY: demo test test-slow test-gpu lint clean

demo: $(READY)
	$(RLHF) run recipes/quickstart.rlhf

test: lint
	$(VENV)/bin/python -m pytest -q

test-slow: $(READY)
	$(VENV)/bin/python -m pytest -q -m slow

test-gpu: $(READY)
	$(VENV)/bin/python -m pytest -q -m gpu

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# DeepSpeed is a source package that reads the installed torch when it builds, so torch comes first and the build
# is not isolated; its operators compile on first use.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt pip setuptools wheel ninja hatchling editables numpy
	$(VENV)/bin/pip install -q -c constraints.txt torch
	DS_BUILD_OPS=0 $(VENV)/bin/pip install -q -c constraints.txt --no-build-isolation deepspeed
	$(VENV)/bin/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
