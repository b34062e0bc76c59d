# make help says what there is. GNU make 3.81 and POSIX tools are enough.

PYTHON ?= python3
PIP_ARGS ?=
CH ?= book/ddpm/posterior.ipynb
PY = .venv/bin/python
STAMP = .venv/.installed
PYTEST_ARGS ?=

.PHONY: help setup book test quick extract refresh lint prove test-other-cpu bench bench-quality clean browser

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## create .venv and install requirements.txt

$(STAMP): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; name one by: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "Python's venv module is missing; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@date +%s > .venv/.install-start
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements.txt
	@expr `date +%s` - `cat .venv/.install-start` > .venv/.install-seconds
	@touch $(STAMP)

book: setup  ## build the book; prints the path of its first page
	@$(PY) tools/build.py

test: setup browser  ## build the book and run every test
	@$(PY) tools/run_tests.py $(PYTEST_ARGS)

browser: setup  ## install Chromium where that is possible
	@command -v chromium >/dev/null 2>&1 || { \
	  if [ "`id -u`" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; \
	  else echo "The site tests need Chromium: install it, or set CHROMIUM to its path."; fi; }

quick: setup  ## check one chapter in under a minute: make quick CH=book/ddpm/posterior.ipynb
	@$(PY) tools/quick.py $(CH)

extract: setup  ## write ddpm_core from the chapters
	@$(PY) tools/extract.py

refresh: setup  ## execute the chapters whose outputs are stale
	@$(PY) tools/refresh.py --stale

lint: setup  ## ruff and mypy --strict
	@$(PY) -m ruff check ddpm_core tools tests benchmarks conftest.py
	@$(PY) -m ruff format --check ddpm_core tools tests benchmarks conftest.py
	@$(PY) -m mypy ddpm_core tools

prove: setup  ## crash safety at length, some minutes: kills, damage, a full disk
	@$(PY) -m pytest -q -m prove -rP tests

test-other-cpu: setup  ## run the chapters as on another CPU: one thread, no AVX-512, no AMX
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
	  MKL_ENABLE_INSTRUCTIONS=AVX2 $(PY) -m pytest --nbval -q book

bench: setup  ## measure the U-Net beside its peers; writes book/results/
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r benchmarks/requirements.txt
	$(PY) benchmarks/blocks.py
	$(PY) benchmarks/run.py

bench-quality: setup  ## train as long as two peers and compare samples; writes book/results/quality.json
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r benchmarks/requirements.txt
	$(PY) benchmarks/quality.py

clean:  ## remove everything that was built or installed
	rm -rf .venv _build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
