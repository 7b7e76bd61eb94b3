# One environment, .venv, made from nothing but Python and a package index, and made again only when
# pyproject.toml or a version below changes. The defaults are a release of torch and its triton.
PYTHON ?= python3
TORCH ?= 2.13.0
TRITON ?= 3.7.1

env = .venv/torch-$(TORCH)-triton-$(TRITON)
native = .venv/native
bin = .venv/bin

.PHONY: demo test check bench mutate dev

demo: $(native)
	$(bin)/python -m patchpack demo

test: $(native)
	$(bin)/pytest -n auto --maxprocesses 8

check: $(env) python/patchpack/kernels
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/pyright --warnings

# glibc returns large blocks to the system at once and pays for their pages again: not what is timed
bench: export MALLOC_MMAP_THRESHOLD_ = 4294967296
bench: export MALLOC_TRIM_THRESHOLD_ = 17179869184
bench: export MALLOC_TOP_PAD_ = 268435456
bench: $(native)
	$(bin)/python bench/run.py $(OP)

mutate: $(native)
	$(bin)/python tests/mutate.py

dev: $(env) python/patchpack/kernels
	$(bin)/pre-commit install

$(env): pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	rm -f .venv/torch-*
	$(bin)/pip install "torch==$(TORCH)" "triton==$(TRITON)"
	PATCHPACK_NATIVE=0 $(bin)/pip install -e ".[dev]"
	touch $@

# the C++ extension, beside the Python it belongs to
$(native): $(env) $(wildcard csrc/*)
	PATCHPACK_NATIVE=1 $(bin)/python setup.py -q build_ext --inplace
	touch $@

# untracked: type checkers and editors do not see the package map of pyproject.toml
python/patchpack/kernels:
	ln -s ../../kernels $@
