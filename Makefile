# Create an environment in .venv, install everything, and run the demo or the tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

WORK_DIR ?= outputs/pocket-training
POCKET = $(BIN)/python -m tools.pocket

.PHONY: demo test test-slow census test-oldest test-middle test-newest lint docs pocket pocket-gpu gpu-report measure compare

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

# `make test PYTEST_ADDOPTS="--cov --cov-report=term"` also says which lines of the root modules the tests reach. It takes a third longer.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

# the tests that take longer: thread marathons, full-size models, the page in a browser
test-slow: $(VENV)/.installed
	RUN_SLOW=1 $(BIN)/python -m pytest -q -n 2 tests/test_threads.py tests/test_full_size.py tests/test_app_browser.py

# The tests of the root modules with other versions of the libraries, in separate environments: the oldest supported versions, some
# in between, and the newest including pre-releases. There the package is not installed but imported through a link.
OLDEST_PYTHON ?= python3.10
VERSIONS = tests/versions
VERSION_TESTS = $(addprefix tests/test_,attention_processors.py auto_pipelines.py chains.py compile.py hooks_ssr.py images_ssr.py \
	internals_ssr.py ip_adapter.py loading.py loading_ssr.py modeling_ssr.py offloading.py pipeline_common.py pipeline_ssr.py \
	precision.py request_ssr.py saving.py selection.py subject_embeds_ssr.py threads.py unknown_arguments.py)

test-oldest: PYTHON = $(OLDEST_PYTHON)
test-oldest: PIP_ARGS = -c $(VERSIONS)/oldest.txt
test-middle: PIP_ARGS = -c $(VERSIONS)/middle.txt
test-newest: PIP_ARGS = --pre --upgrade

test-oldest test-middle test-newest: test-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python tools/install.py $(PIP_ARGS) -r $(VERSIONS)/requirements.txt
	.venv-$*/bin/python tools/link_package.py
	.venv-$*/bin/python -m pytest -q -n auto --maxprocesses 4 $(VERSION_TESTS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p outputs/mypy && ln -sfn ../.. outputs/mypy/diffusers_ssr
	$(BIN)/mypy

# The sizes of the modules, scripts and docs, and what they must not exceed.
census:
	$(PYTHON) tools/census.py

# The guide and the API reference, as a site in outputs/docs.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# only what the demo needs, which installs faster than the packages of the tests
$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch, diffusers and what the demo needs into $(VENV), once: docs/install.md says how much that is."
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python tools/install.py -e ".[demo]"
	touch $@

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch, diffusers and what the tests need into $(VENV), once: docs/install.md says how much that is."
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python tools/install.py -e ".[test]"
	touch $@

# Train a pocket checkpoint from scratch on a CPU, which takes many hours. Every step continues where it was interrupted.
# The checkpoint in pocket/ was trained on a GPU, with the same scripts and larger batches (`make pocket-gpu`). The base model
# sees a fifteenth of the images here, so the result, which was never measured, will be worse.
pocket: $(VENV)/.installed
	$(POCKET).train.clip --work_dir $(WORK_DIR)
	$(POCKET).train.clip --part vision --work_dir $(WORK_DIR)
	$(POCKET).train.judge --work_dir $(WORK_DIR)
	$(POCKET).train.vae --part decoder --work_dir $(WORK_DIR)
	$(POCKET).train.vae --part encoder --max_train_steps 2000 --work_dir $(WORK_DIR)
	$(POCKET).train.unet --work_dir $(WORK_DIR)
	$(POCKET).train.controlnet --work_dir $(WORK_DIR)
	$(POCKET).train.motion --work_dir $(WORK_DIR)
	$(POCKET).train.look --work_dir $(WORK_DIR)
	$(POCKET).train.assemble --work_dir $(WORK_DIR) --output_dir $(WORK_DIR)/base
	# the methods that are compared
	$(POCKET).train.pairs --work_dir $(WORK_DIR) --output_dir $(WORK_DIR)/single-pairs --num_rows 30000 \
		--two_share 0 --absent_share 0 --masked_share 0.2 --seed 1
	$(POCKET).train.adapters --work_dir $(WORK_DIR) --checkpoint $(WORK_DIR)/base --pairs_dir $(WORK_DIR)/single-pairs --no-cache
	# the SSR-Encoder of the checkpoint
	$(POCKET).train.pairs --work_dir $(WORK_DIR) --num_rows 120000 --other_subjects_share 0.8 --free_share 0.3 \
		--others_share 0.3 --two_share 0.22
	$(POCKET).train.adapters --work_dir $(WORK_DIR) --checkpoint $(WORK_DIR)/base --methods ssr --no-cache \
		--max_train_steps 22000 --options=--consistency_weight=0.0003 --output_dir $(WORK_DIR)/shipped
	$(POCKET).train.assemble --work_dir $(WORK_DIR) --output_dir $(WORK_DIR)/result \
		--comparison_dir $(WORK_DIR)/comparison

# Train the autoencoder, the base model and the SSR-Encoder of a new pocket checkpoint on one data-centre GPU, in two calls of at most
# nine minutes. The second one continues. `nvidia-cuda-mps-control -d` doubles the speed, `ARGS=--dry_run` runs two steps of
# everything on a CPU, and `ARGS=--further` trains the other models on the new base model.
pocket-gpu: $(VENV)/.installed
	$(POCKET).train.gpu --work_dir $(WORK_DIR)-gpu $(ARGS)

# Memory, speed and the tests that need a GPU, in at most five minutes on one GPU. `ARGS=--dry_run` runs everything on a CPU.
gpu-report: $(VENV)/.installed
	$(BIN)/python tools/gpu_report.py $(ARGS)

# Measure the figures of pocket/README.md with the weights in pocket/.
measure: $(VENV)/.installed
	$(POCKET).measure --work_dir $(WORK_DIR)

# Compare SSR-Encoder with an adapter like IP-Adapter-Plus and with its ablations, on 500 references, with the weights in pocket/.
compare: $(VENV)/.installed
	$(POCKET).measure --work_dir $(WORK_DIR) --parts comparison --num_references 500
