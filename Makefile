# `make demo` and `make test` do all set-up: virtual environment, dependencies, build. No root, no GPU, no nvcc.
# TORCH_SPEC is the pip requirement for torch; TORCH_SPEC=system uses the torch of PYTHON's environment. The public
# index serves the CUDA build; a smaller CPU build: make demo TORCH_SPEC="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
CMAKE_ARGS ?=
BIN := $(abspath $(VENV))/bin
TOOLS := cmake ninja scikit-build-core pybind11
SOURCES := $(shell find csrc cuda third_party CMakeLists.txt pyproject.toml -type f 2>/dev/null)
# glibc fills fresh memory of the kernels' scratch with 0x7f bytes; torch's own is poisoned by tests/conftest.py.
PYTEST = MALLOC_PERTURB_=128 $(BIN)/python -m pytest
ISAS = $(shell $(BIN)/python -c "from effops import _host as h; print(*[i for i in h.cpu_isas() if i != h.cpu_isa()])")

.PHONY: all demo test test-native test-isas test-simt mutants mutants-simt sanitize bench format lint dist cuda cuda-all simt clean
all: .stamps/build

.stamps/deps: third_party/constraints.txt Makefile
	@mkdir -p .stamps
	@$(if $(filter system,$(TORCH_SPEC)),$(PYTHON) -m venv --system-site-packages $(VENV),$(PYTHON) -m venv $(VENV))
	@echo "installing dependencies"
	@$(if $(filter system,$(TORCH_SPEC)),,$(BIN)/pip install -q $(TORCH_SPEC))
	@$(BIN)/pip install -q -c third_party/constraints.txt $(TOOLS) numpy safetensors tokenizers rich matplotlib \
	  transformers
	@touch $@

.stamps/test-deps: .stamps/deps
	@$(BIN)/pip install -q -c third_party/constraints.txt pytest hypothesis ruff mypy clang-format build
	@touch $@

.stamps/build: .stamps/deps $(SOURCES)
	@echo "building"
	@PATH="$(BIN):$$PATH" CMAKE_ARGS="$(CMAKE_ARGS)" $(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $@

demo: .stamps/build
	@$(BIN)/effops demo

test: test-native test-isas test-simt

test-native: .stamps/build .stamps/test-deps
	$(PYTEST)

# The core set once on every other instruction set that this processor supports.
test-isas: .stamps/build .stamps/test-deps
	@for isa in $(ISAS); do echo "EFFOPS_CPU_ISA=$$isa pytest -m core"; EFFOPS_CPU_ISA=$$isa $(PYTEST) -m core || exit 1; done

# The ops' tests, and speculative decoding, with the CUDA kernels on the host.
SIMT_TESTS = attention_bounds attention_exact attention_gradients attention_laws varlen paged tree_attention sparse \
  cascade labels page_bounds mass evict merge_kv merge append commit layer rotary_append sampling trees verify typical \
  verify_law backend contract dispatch linear quantized_linear pim_gemv routing moe_permute grouped fused_experts lora_experts moe_gradients
test-simt: .stamps/build .stamps/test-deps simt
	EFFOPS_BACKEND=simt EFFOPS_SIMT_LIBRARY=$(abspath build/simt/libeffops_simt.so) $(PYTEST) -rs \
	  $(SIMT_TESTS:%=tests/ops/test_%.py) tests/decoding/test_speculate.py

mutants: .stamps/build .stamps/test-deps
	@PATH="$(BIN):$$PATH" $(BIN)/python tools/mutants.py

# The same in the CUDA kernels, on the host.
mutants-simt: .stamps/build .stamps/test-deps
	@PATH="$(BIN):$$PATH" $(BIN)/python tools/mutants.py --simt

sanitize: .stamps/deps
	@for kind in address,undefined thread; do \
	  PATH="$(BIN):$$PATH" cmake -S . -B build/sanitize-$$kind -G Ninja -DEFFOPS_CPP_TESTS=ON -DEFFOPS_SANITIZE=$$kind >/dev/null && \
	  PATH="$(BIN):$$PATH" cmake --build build/sanitize-$$kind && PATH="$(BIN):$$PATH" ctest --test-dir build/sanitize-$$kind --output-on-failure || exit 1; done
	@PATH="$(BIN):$$PATH" cmake -S . -B build/simt-sanitize -G Ninja -DEFFOPS_SIMT=ON -DEFFOPS_SANITIZE=address,undefined >/dev/null
	@PATH="$(BIN):$$PATH" cmake --build build/simt-sanitize && PATH="$(BIN):$$PATH" ctest --test-dir build/simt-sanitize --output-on-failure

bench: .stamps/build
	$(BIN)/effops bench attention
	$(BIN)/effops bench linear
	$(BIN)/effops bench tree
	$(BIN)/effops bench sparse
	$(BIN)/effops bench streaming
	$(BIN)/effops bench cascade
	$(BIN)/effops bench moe
	$(BIN)/effops bench model

format: .stamps/test-deps
	$(BIN)/ruff check --fix --select I . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc cuda tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cu')

lint: .stamps/test-deps
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc cuda tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	$(BIN)/mypy

dist: .stamps/test-deps
	PATH="$(BIN):$$PATH" EFFOPS_TORCH_DIR=$$($(BIN)/python -c "import torch, os; print(os.path.dirname(torch.__file__))") \
	  $(BIN)/python -m build -q --no-isolation --outdir dist .

# Compiles the CUDA kernels; needs nvcc, no GPU.
CUDA_ARCHS ?= 80
cuda: .stamps/deps
	PATH="$(BIN):$$PATH" cmake -S . -B build/cuda -G Ninja -DEFFOPS_CUDA=on "-DEFFOPS_CUDA_ARCHS=$(CUDA_ARCHS)" -DPython_EXECUTABLE=$(BIN)/python >/dev/null
	PATH="$(BIN):$$PATH" cmake --build build/cuda --target effops_ops
cuda-all:
	$(MAKE) cuda "CUDA_ARCHS=80;90a"

# Builds the CUDA kernels for the host, and runs the tests of the machine that runs them there; needs no nvcc.
simt: .stamps/deps
	PATH="$(BIN):$$PATH" cmake -S . -B build/simt -G Ninja -DEFFOPS_SIMT=ON >/dev/null
	PATH="$(BIN):$$PATH" cmake --build build/simt
	PATH="$(BIN):$$PATH" ctest --test-dir build/simt --output-on-failure

clean:
	rm -rf build dist out .stamps
