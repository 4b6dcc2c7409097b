# `make quickstart` and `make test` set themselves up: a virtual environment in .venv, made once.
# recbole 1.2.1 resolves on Python 3.11; another interpreter: make PYTHON=/path/to/python3.11 ...
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
INSTALLED = $(VENV)/.installed
DOCS_INSTALLED = $(VENV)/.docs-installed
PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test slow commands commands-small lint docs bench gpu fuzz torture clean

quickstart: $(INSTALLED)
	$(VENV)/bin/python run_recbole_llm.py --model=SASRec,LLMSRec,LLMSTAR --dataset=ml-100k --config_files=properties/quickstart.yaml

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "not slow"

# What takes longer than ten seconds a test; nightly, and before a release.
slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal -m slow

# README's commands as they stand, in a clean copy: on tiny data in a minute, and in full size in hours.
commands-small: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/readme_commands.py --small

commands: $(INSTALLED)
	$(VENV)/bin/python tests/readme_commands.py

lint: $(INSTALLED)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

# Pages in site/; a broken link, anchor or reference is an error.
docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

bench: $(INSTALLED)
	for name in step_cost generation_cost st2si_cost softmax_memory; do $(VENV)/bin/python benchmarks/$$name.py || exit 1; done

# What a CPU cannot show, in ten minutes on one GPU: a table, and gpu.json. make gpu GPU="--device=cpu --size=tiny" tries it without.
gpu: $(INSTALLED)
	$(VENV)/bin/python benchmarks/gpu.py $(GPU)

# Odd values for every key; kills, simultaneous runs and full disks. Each takes half an hour or more.
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/robustness/fuzz.py

torture: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/robustness/torture.py

# A marker is written last, so that an installation that was cut off is taken up again.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e ".[test]"
	touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(PIP_INSTALL) -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info recbole_llm.egg-info
