# make demo   pictures from zimage-nano on the CPU       make test    every test
# make lint   format, lint and type checks               make bundle  the bundle the demo serves

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where a CPU build is offered it is enough; a CUDA build works too.
TORCH ?= torch==2.13.0
BUNDLE := engines/nano
CHECKPOINT := $(shell find checkpoints/zimage-nano -name '*.safetensors' -o -name '*.json')

.PHONY: demo test lint bundle clean

$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[onnxruntime,tensorrt-rtx,cli,export,gguf,reference,dev]'
	touch $@

$(BUNDLE)/manifest.json: $(VENV)/installed engines/nano.toml $(CHECKPOINT) $(shell find export -name '*.py')
	$(BIN)/zimage-export engines/nano.toml

bundle: $(BUNDLE)/manifest.json

demo: bundle
	$(BIN)/zimage generate $(BUNDLE) -o out --seed 1 \
	  -p "a panda on a blue background" \
	  -p "白色背景上的一个苹果" \
	  -p "a cat on the left and a house on the right, purple background" \
	  -p "一只 penguin，绿色背景"

test: bundle
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -name '*.cc' -o -name '*.h')

clean:
	rm -rf $(VENV) build $(BUNDLE) out
