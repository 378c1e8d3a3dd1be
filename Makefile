# make demo                       the whole recipe in minutes: record, train, evaluate; open runs/demo/report.html
# make test                       all tests but the slow ones, in minutes
# make test-all                   every test: what starts or kills several processes, or simulates for long, too
# make test-newest, test-oldest   what depends on libraries, with their newest versions and with setup.cfg's oldest
# make lock                       requirements.lock anew, from the newest versions that setup.cfg allows
# make lint                       ruff

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
UV := $(shell command -v uv)
# Threads that wait for each other sleep instead of spinning: beside other programs spinning takes their cores away.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all test-newest test-oldest lock lint
.DELETE_ON_ERROR:

# $(call install,ENVIRONMENT): pip's quiet install into a virtual environment; uv's, which is faster, where it is there.
install = $(if $(UV),$(UV) pip install --quiet --python $(1)/bin/python,$(1)/bin/python -m pip install --quiet)

# What `make demo` needs: no simulator of LIBERO, DeepSpeed or bitsandbytes.
.venv/base: setup.cfg pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	@echo "installing into .venv: a few gigabytes, a few minutes"
	@$(call install,.venv) --constraint requirements.lock --editable .
	@touch $@

.venv/dev: .venv/base
	@echo "installing simulators and what tests need into .venv"
	@$(call install,.venv) --constraint requirements.lock --editable ".[dev]"
	@touch $@

# What `make demo` runs, and what its report shows.
define DEMO_COMMANDS
python data_prep/record_pusht.py --num_episodes 40 --num_proc 2 --output_dir $(DEMO)/data
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sft_pusht.py --config recipes/pusht/nano.yaml --dataset_name $(DEMO)/data --output_dir $(DEMO)/train
python eval/eval_offline.py --model_name_or_path $(DEMO)/train/initial --dataset_name $(DEMO)/data --episodes 36:40 --output_dir $(DEMO)/untrained
python eval/eval_offline.py --model_name_or_path $(DEMO)/train --dataset_name $(DEMO)/data --episodes 36:40 --output_dir $(DEMO)/trained
python eval/eval_pusht.py --model_name_or_path $(DEMO)/train/initial --num_episodes 16 --num_videos 16 --output_dir $(DEMO)/untrained
python eval/eval_pusht.py --model_name_or_path $(DEMO)/train --num_episodes 16 --num_videos 16 --output_dir $(DEMO)/trained
python eval/summarize.py $(DEMO)/untrained $(DEMO)/trained --title "PushT, from nothing, in minutes" --commands $(DEMO)/commands.txt --output $(DEMO)
endef
export DEMO_COMMANDS

demo: .venv/base
	@mkdir -p $(DEMO)
	@echo "$$DEMO_COMMANDS" > $(DEMO)/commands.txt
	@. $(BIN)/activate && while read -r command; do \
		printf '\n\033[1m$$ %s\033[0m\n' "$$command"; \
		eval "$$command" < /dev/null || exit; \
	done < $(DEMO)/commands.txt
	@printf '\nreport: %s/report.html\n' "$(CURDIR)/$(DEMO)"

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadscope

test: .venv/dev
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: .venv/dev
	$(PYTEST) $(PYTEST_ARGS)

# Environments of their own, made anew each time. Tests that touch a library's inside, or its formats.
VERSIONED := tests/processing tests/models tests/policy tests/training tests/envs tests/data/test_chat_dataset.py \
	tests/evaluation/test_rollout.py tests/evaluation/test_open_loop.py

test-newest test-oldest: test-%: .venv/dev
	rm -rf .venv-$*
	$(PYTHON) -m venv .venv-$*
	@$(BIN)/python .ci/requirements.py $* > .venv-$*/requirements.txt
	@$(call install,.venv-$*) --requirement .venv-$*/requirements.txt
	@$(call install,.venv-$*) --no-deps --editable .
	.venv-$*/bin/python -m pip freeze --exclude-editable
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest --numprocesses auto --dist loadscope -m "not slow" $(VERSIONED) $(PYTEST_ARGS)

# Old and new lines side by side: < what was, > what is.
lock: .venv/dev
	@cp requirements.lock .venv/requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade --no-annotate \
		--custom-compile-command "make lock" --output-file requirements.lock setup.cfg
	@diff --suppress-common-lines .venv/requirements.lock requirements.lock && echo "requirements.lock: no change" || true

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
