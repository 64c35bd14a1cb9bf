# Every target prepares what it needs. Start with `make help`.
PYTHON ?= python3
BIN := .venv/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} MPLBACKEND=agg
DEMO ?= runs/demo
SEED := $(or $(SEED),$(shell date +%s))
PYTEST := pytest --randomly-seed=$(SEED)

.PHONY: help demo test test-long test-browser chromium check lab export notebooks bench bench-gpu clean-env

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; name one: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (once; PyTorch is large) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: .venv/.ready ## train on the bundled images with two processes, then write a report
	@$(BIN)/llb fetch
	$(RUN) torchrun --standalone --nproc_per_node=2 -m llb.train --recipe demo --save_dir $(dir $(DEMO)) --name $(notdir $(DEMO)) --overwrite
	@$(BIN)/llb report $(DEMO)

check: .venv/.ready ## the fast checks, before a commit: notebooks and package agree, style, quick tests
	@before=$$(mktemp -d) && cp -r nbs llb $$before && $(RUN) nbdev_clean && $(RUN) nbdev_export && \
	diff -r -x __pycache__ $$before/nbs nbs && diff -r -x __pycache__ $$before/llb llb && rm -r $$before && echo "nbs and llb agree"
	@$(BIN)/ruff check .
	@echo "Tests run in a random order; SEED=$(SEED) repeats it."
	@$(RUN) $(PYTEST) -m "not slow and not long" -n 2

test: check chromium ## everything that can be tested on a CPU
	@$(BIN)/llb fetch
	@$(RUN) nbdev_test --n_workers 2 --do_print --timing
	@$(RUN) $(PYTEST) -m "slow and not browser and not long" -rs -n 2
	@$(RUN) $(PYTEST) -m browser -rs -n 2 --dist loadscope

test-long: .venv/.ready ## kill, stop and starve runs at random, about ten minutes
	@$(RUN) $(PYTEST) -m long -s

test-browser: .venv/.ready chromium ## only the notebooks in JupyterLab, driven through Chromium
	@$(RUN) $(PYTEST) -m browser -rs

chromium:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	echo "Installing Chromium for the browser tests ..."; sudo=$$(test "$$(id -u)" = 0 || echo "sudo -n"); \
	{ $$sudo apt-get -qq update && $$sudo apt-get -qq install -y --no-install-recommends chromium; } >/dev/null 2>&1 || \
	echo "Chromium could not be installed: the browser tests will be skipped. Install it by hand to run them."

lab: .venv/.ready ## JupyterLab on the quickstart
	@$(BIN)/llb fetch
	@$(BIN)/jupyter lab nbs/guides/quickstart.ipynb

export: .venv/.ready ## write llb/*.py from the notebooks
	@$(RUN) nbdev_clean && $(RUN) nbdev_export

notebooks: .venv/.ready ## run all notebooks and store their outputs
	@for nb in nbs/*/*.ipynb nbs/*.ipynb; do \
	$(RUN) TQDM_DISABLE=1 MPLBACKEND=module://matplotlib_inline.backend_inline jupyter nbconvert --to notebook --execute --inplace \
	--ExecutePreprocessor.store_widget_state=False --log-level WARN $$nb || exit 1; done
	@perl -pi -e "s#\Q$$HOME\E/#~/#g" nbs/*/*.ipynb nbs/*.ipynb
	@$(RUN) nbdev_clean

bench: .venv/.ready ## step time, images/s, memory and input speed against a plain version, on the CPU (some minutes)
	@$(BIN)/python benchmarks/bench.py $(BENCH)

bench-gpu: .venv/.ready ## the same on a CUDA GPU, with MFU and the share of time spent waiting for data
	@$(BIN)/python benchmarks/bench.py --device cuda --rounds 10 $(BENCH)

clean-env: ## delete the environment
	@rm -rf .venv
