# make demo    images from zimage-nano on the CPU     make test    every test
# make cuda    the CUDA backend, built in place       make wheel   one wheel with it, for Python 3.11 to 3.14
# make bundle  the bundle that the demo serves        make lint    format, lint and type checks
# make native  the C++ under a second compiler and under sanitizers

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports; compiling all of torch at installation takes half a minute more.
PIP := $(BIN)/pip install -q --no-compile
# Where a CPU build is offered it is enough; a CUDA build works too.
TORCH ?= torch==2.13.0
BUNDLE := engines/nano
CHECKPOINT := $(shell find checkpoints/zimage-nano -name '*.safetensors' -o -name '*.json')
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard cmake/*) $(shell find csrc -type f)
# All GPUs that _cuda runs on. One is faster to compile: make cuda CUDA_ARCHITECTURES=90a-real
CUDA_ARCHITECTURES ?= 80-real;89-real;90a-real;120
CMAKE_OPTIONS ?=
# ccache makes the second build of the same sources a matter of seconds, from another clone as well.
CCACHE := $(shell command -v ccache)
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1
BUILD_CUDA := ZIMAGE_RT_CUDA=ON ZIMAGE_RT_BUILD=$(CURDIR)/build/cuda \
  CMAKE_CXX_COMPILER_LAUNCHER=$(CCACHE) CMAKE_CUDA_COMPILER_LAUNCHER=$(CCACHE) \
  CMAKE_ARGS='"-DZIMAGE_RT_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)" $(CMAKE_OPTIONS)'

.PHONY: demo test lint bundle clean cuda wheel native

# Once `make cuda` has run, every further installation here builds _cuda, too.
define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(if $(wildcard $(VENV)/cuda),$(BUILD_CUDA)) $(PIP) $(if $(wildcard $(VENV)/cuda),--no-build-isolation) -e '.[$(1)]'
endef

# What the demo needs, and what tests and checks need beside it.
$(VENV)/installed: $(SOURCES)
	$(call install,onnxruntime$(comma)cli$(comma)server$(comma)comfyui$(comma)export$(comma)reference)
	touch $@

$(VENV)/dev: $(SOURCES)
	$(call install,onnxruntime$(comma)tensorrt-rtx$(comma)cli$(comma)server$(comma)comfyui$(comma)export$(comma)gguf$(comma)xlsx$(comma)reference$(comma)build$(comma)dev)
	touch $(VENV)/installed $@

comma := ,

cuda: $(VENV)/installed
	$(PIP) $$($(BIN)/python cmake/requirements.py build cuda cuda-headers nvcc)
	$(BUILD_CUDA) $(PIP) --no-build-isolation --no-deps -e .
	touch $(VENV)/cuda
	$(BIN)/python -c "from zimage_rt import _cuda; print('_cuda is built for', _cuda.architectures)"

wheel:
	test -x build/wheel/bin/python || $(PYTHON) -m venv build/wheel
	build/wheel/bin/pip install -q $$($(PYTHON) cmake/requirements.py build cuda-headers nvcc wheel)
	CMAKE_CXX_COMPILER_LAUNCHER=$(CCACHE) CMAKE_CUDA_COMPILER_LAUNCHER=$(CCACHE) \
	  build/wheel/bin/python cmake/make_wheel.py --out dist $(WHEEL_OPTIONS)

native: $(VENV)/dev
	$(PIP) $$($(BIN)/python cmake/requirements.py build wheel)
	$(BIN)/python cmake/second_compiler.py build/cuda/compile_commands.json
	tests/sanitizers.sh $(BIN)/python

# Installing more, as `make test` does after `make demo`, makes no other bundle.
$(BUNDLE)/manifest.json: engines/nano.toml $(CHECKPOINT) $(shell find export -name '*.py') | $(VENV)/installed
	$(BIN)/zimage-export engines/nano.toml

bundle: $(BUNDLE)/manifest.json

demo: bundle
	$(BIN)/zimage generate $(BUNDLE) -o out --seed 1 \
	  -p "a butterfly on a pink background" \
	  -p "一个红灯笼，下面写着“新年快乐”，黄色背景" \
	  -p "a rocket above a globe, black background" \
	  -p "左边是 penguin，右边是 snowman，蓝色背景"

test: $(VENV)/dev bundle
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -name '*.cc' -o -name '*.h')

clean:
	rm -rf $(VENV) build $(BUNDLE) out
