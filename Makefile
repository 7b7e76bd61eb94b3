# One environment, .venv, made from nothing but Python and a package index, and made again only when
# pyproject.toml or a version below changes. The defaults are a release of torch and its triton.
PYTHON ?= python3
TORCH ?= 2.13.0
TRITON ?= 3.7.1
ABI ?= 2.10.0 2.11.0 2.13.0 2.14.1
TRANSFORMERS ?= 5.9.0

env = .venv/torch-$(TORCH)-triton-$(TRITON)
native = python/patchpack/_C.abi3.so
bin = .venv/bin

.PHONY: demo test slow check transformers bench compiled mutate fuzz sanitize abi dev

demo: $(native)
	$(bin)/python -m patchpack demo

test: $(native)
	$(bin)/pytest -n auto --maxprocesses 8

# the rest: what is tested anyway, of more cases
slow: $(native)
	$(bin)/pytest -n auto --maxprocesses 8 -m slow

check: $(native) python/patchpack/kernels
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/pyright --warnings
	$(bin)/torch-abi-audit --check both $(native)
	$(bin)/torch-abi-audit $(native) | grep -q "Min torch: *2.10.0"

# models of another transformers than the environment's: of the oldest that is known, by default
transformers: older = build/transformers-$(TRANSFORMERS)
transformers: $(native)
	test -d $(older) || $(bin)/pip install -q --target $(older) "transformers==$(TRANSFORMERS)"
	PYTHONPATH=$(older) $(bin)/pytest -n auto --maxprocesses 8 tests/test_transformers.py \
	tests/test_image_processor.py

# Of a GPU, if torch finds one, else of the CPU; OP names ops or gives options of bench/run.py.
# What is compared beside torch and transformers needs a GPU: add flash-attn, which compiles long
PEERS ?= liger-kernel
# glibc returns large blocks to the system at once and pays for their pages again: not what is timed
bench: export MALLOC_MMAP_THRESHOLD_ = 4294967296
bench: export MALLOC_TRIM_THRESHOLD_ = 17179869184
bench: export MALLOC_TOP_PAD_ = 268435456
bench: $(native)
	-$(bin)/pip install -q --no-build-isolation $(PEERS)
	$(bin)/python bench/run.py --check $(OP)

# What kernels are compiled to for GPUs that need not be there; CHECKOUTS: a folder of other libraries.
# All of it takes hours on two cores; OP and TARGET name parts, and the rest of the tables stays
compiled: $(native)
	PYTHONPATH=bench $(bin)/python -m compiled $(addprefix --peers ,$(CHECKOUTS)) $(addprefix --op ,$(OP)) \
	$(addprefix --target ,$(TARGET))

mutate: $(native)
	$(bin)/python tests/mutate.py

# drawn batches of every op, for FUZZ_SECONDS; what failed before comes first
FUZZ_SECONDS ?= 600
fuzz: $(native)
	$(bin)/python tests/test_fuzz.py --seconds $(FUZZ_SECONDS)

# the native ops in a copy of the package whose C++ watches its memory and its arithmetic
sanitize: watch = -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: $(env)
	PATCHPACK_NATIVE=1 LDFLAGS="$(watch)" CXXFLAGS="$(watch) -fno-wrapv -O1 -g1 -D_GLIBCXX_ASSERTIONS" \
	$(bin)/python setup.py -q build --build-base build/sanitized --build-lib build/sanitized/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized/lib \
	$(bin)/pytest -n auto --maxprocesses 8 --dist worksteal -m "" \
	-k "native and not (native_vit or opcheck or compiled or meta_and_fake or lesser and int64)"

# one wheel on several versions of torch: gigabytes, and minutes for each. What an earlier build left
# in build/lib would be in it
abi: $(env)
	rm -rf build/wheel build/lib.*
	PATCHPACK_NATIVE=1 $(bin)/pip wheel --no-deps --no-build-isolation -w build/wheel .
	$(bin)/python tests/abi.py build/wheel/*.whl $(ABI)

dev: $(env) python/patchpack/kernels
	$(bin)/pre-commit install

$(env): pyproject.toml
	$(PYTHON) -m venv .venv
	rm -f .venv/torch-*
	$(bin)/pip install "torch==$(TORCH)" "triton==$(TRITON)"
	PATCHPACK_NATIVE=0 $(bin)/pip install -e ".[dev]"
	touch $@

# the C++ extension, beside the Python it belongs to
$(native): $(env) setup.py $(wildcard csrc/*.cpp csrc/*.h)
	PATCHPACK_NATIVE=1 $(bin)/python setup.py -q build_ext --inplace

# untracked: type checkers and editors do not see the package map of pyproject.toml
python/patchpack/kernels:
	ln -s ../../kernels $@
