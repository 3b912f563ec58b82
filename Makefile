# `make demo` runs the main job on real input, `make test` the checks; both set up a virtual environment of their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-
# into the environment of a folder of programs, without setuptools' advice on editable installs;
# compiled where it is imported: all of it would take two minutes, of which tests and pages need a fifth
install = PYTHONWARNINGS=ignore $(1)/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all types release docs bench bench-full nightly fix clean

help:
	@echo "make demo    distil SmolLM2-135M through a chain and make sizes in between (10 to 22 minutes on 2 cores of a Xeon, an hour or two on slower ones)"
	@echo "make test    documentation, lint, types, doctests and tests (5 to 20 minutes, by the CPU)"
	@echo "make test-all  the same with every walk over requests, 10,000 fuzzed cases, every view of the page (pictures in artefacts/space), and a release"
	@echo "make release the wheel and the sdist, in dist/, once they install and run with the lowest and the newest versions"
	@echo "make docs    the documentation, in build/site"
	@echo "make bench   the benchmarks that take minutes, and benchmarks/README.md (27 minutes on cores that are quick in bf16, set-up and the chain of make demo included); goes on where it was stopped"
	@echo "make bench-full  also those that train rivals, for hours"
	@echo "make nightly the tests against the real Hub, with the account of HF_TOKEN"
	@echo "make fix     let ruff mend what it can"
	@echo "make clean   remove the virtual environment"

# the pip that comes with an older Python takes minutes to resolve what a newer one does in one
$(READY)venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cbd_hub needs Python 3.11 or newer, found " + sys.version.split()[0] + "; run make PYTHON=python3.12")'
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	touch $@

# torch first and pinned: an open range can pull a CUDA build of several GB
$(READY)torch: $(READY)venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(call install,$(BIN)) torch==2.13.0
	touch $@

$(READY)demo: $(READY)torch pyproject.toml
	$(call install,$(BIN)) --editable '.[demo]'
	touch $@

$(READY)dev: $(READY)torch pyproject.toml
	$(call install,$(BIN)) --editable '.[dev]'
	touch $@

# the page's tests drive Debian's browser, which root fetches here; without one they are skipped and say so
$(READY)browser: $(READY)venv
	command -v chromium >/dev/null || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ] \
		|| { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } >/dev/null 2>&1 || true
	touch $@

demo: $(READY)demo
	$(BIN)/python examples/demo.py --out demo

# what uses one core stands side by side; pytest fills them all
test:
	$(MAKE) --jobs 3 $(READY)browser docs types
	$(BIN)/pytest -n auto --dist loadfile --durations 20

types: $(READY)dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# pictures and options from the code, pages with every warning an error
docs: $(READY)dev
	$(BIN)/python docs/figures.py
	$(BIN)/python -m typer cbd_hub.cli utils docs --name cbd --title "Arguments and options" --output docs/reference/options.md >/dev/null
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

$(READY)all: $(READY)dev pyproject.toml
	$(call install,$(BIN)) --editable '.[dev,gguf,onnx,quantised]'
	touch $@

test-all: $(READY)all $(READY)browser $(READY)mergekit types
	CBD_FUZZ_CASES=10000 CBD_MERGEKIT_PYTHON=$(VENV)/mergekit/bin/python $(BIN)/pytest -m "not nightly"

$(READY)bench: $(READY)dev pyproject.toml
	$(call install,$(BIN)) --editable '.[dev,demo,bench]'
	touch $@

# mergekit pins what it needs, and so has an environment of its own
$(READY)mergekit:
	$(PYTHON) -m venv --upgrade-deps $(VENV)/mergekit
	$(call install,$(VENV)/mergekit/bin) torch==2.13.0
	$(call install,$(VENV)/mergekit/bin) mergekit==0.1.5
	touch $@

bench: $(READY)bench $(READY)mergekit
	$(BIN)/python benchmarks/bench.py --mergekit-python $(VENV)/mergekit/bin/python

bench-full: $(READY)bench $(READY)all $(READY)mergekit
	$(BIN)/python benchmarks/bench.py --full --mergekit-python $(VENV)/mergekit/bin/python

release: $(READY)dev
	$(BIN)/pytest -m "not nightly" tests/test_release.py
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

nightly: $(READY)dev
	$(BIN)/pytest -m nightly tests/test_nightly.py

fix: $(READY)dev
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV)
