# make demo                       a policy that pushes, then one from nothing in minutes; open runs/demo/report.html
# make policy                     trains the shipped policy again, from an empty folder, in about an hour; goes on after a stop
# make libero                     one LIBERO task from nothing, in 40 minutes; $LIBERO_ASSETS, or the Hub, has its meshes
# make test                       all tests but the slow ones, in minutes
# make test-all                   every test: what starts or kills several processes, or simulates for long, too
# make test-newest, test-oldest   what depends on libraries, with their newest versions and with setup.cfg's oldest
# make lock                       writes requirements.lock again, from the newest versions that setup.cfg allows
# make lint                       ruff

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
POLICY := runs/policy
LIBERO := runs/libero
UV := $(shell command -v uv)
# As many as a small model can use; accelerate would take all cores, and say so.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false

.PHONY: demo policy libero test test-all test-newest test-oldest lock lint
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

# What `make demo` runs, and what its report shows: the shipped policy first; then one from nothing, on the same seeds.
define DEMO_COMMANDS
python eval/eval_pusht.py --model_name_or_path recipes/pusht/checkpoint --num_episodes 16 --num_videos 16 --output_dir $(DEMO)/shipped
python data_prep/teach_pusht.py --num_episodes 400 --steps 12000 --rounds 6000 --round_episodes 100 --num_eval_episodes 50 --num_proc 2 --output_dir $(DEMO)/teacher
python data_prep/rows_pusht.py --teacher $(DEMO)/teacher --num_rows 40000 --num_bins 255 --num_proc 2 --output_dir $(DEMO)/rows
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sft_pusht.py --config recipes/pusht/policy.yaml --dataset_name $(DEMO)/rows --dagger_teacher $(DEMO)/teacher/teacher.safetensors --max_steps 4000 --dagger_steps 500 --dagger_episodes 20 --use_state false --save_initial true --output_dir $(DEMO)/train
python eval/eval_pusht.py --model_name_or_path $(DEMO)/train/initial --num_episodes 16 --num_videos 16 --output_dir $(DEMO)/untrained
python eval/eval_pusht.py --model_name_or_path $(DEMO)/train --num_episodes 16 --num_videos 16 --output_dir $(DEMO)/ten_minutes
python eval/summarize.py $(DEMO)/untrained $(DEMO)/ten_minutes $(DEMO)/shipped --title "PushT, from random weights" --commands $(DEMO)/commands.txt --output $(DEMO)
endef

# What `make policy` runs: the shipped policy trained again, from an empty folder.
define POLICY_COMMANDS
python data_prep/teach_pusht.py --num_proc 2 --output_dir $(POLICY)/teacher
python data_prep/rows_pusht.py --teacher $(POLICY)/teacher --num_rows 120000 --num_bins 255 --num_proc 2 --output_dir $(POLICY)/rows
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sft_pusht.py --config recipes/pusht/policy.yaml --dataset_name $(POLICY)/rows --dagger_teacher $(POLICY)/teacher/teacher.safetensors --output_dir $(POLICY)/train
python eval/eval_pusht.py --model_name_or_path $(POLICY)/train --num_episodes 500 --seed 3000000 --num_videos 4 --output_dir $(POLICY)/eval
python eval/summarize.py $(POLICY)/eval --title "PushT, from random weights" --commands $(POLICY)/commands.txt --output $(POLICY)
endef

# What `make libero` runs: a policy for one task of libero_object, from an empty folder.
define LIBERO_COMMANDS
python data_prep/rows_libero.py --num_bins 255 --num_proc 2 --output_dir $(LIBERO)/rows
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sft_libero.py --config recipes/libero/nano.yaml --dataset_name $(LIBERO)/rows --output_dir $(LIBERO)/train
python eval/eval_libero.py --model_name_or_path $(LIBERO)/train --suites libero_object --task_ids 0 --render_size 128 --num_envs 2 --num_videos 4 --output_dir $(LIBERO)/eval
python eval/summarize.py $(LIBERO)/eval --title "LIBERO, from random weights" --commands $(LIBERO)/commands.txt --output $(LIBERO)
endef
export DEMO_COMMANDS POLICY_COMMANDS LIBERO_COMMANDS

# $(call run_all,FOLDER,VARIABLE): one command after another; each goes on where it was stopped.
define run_all
	@mkdir -p $(1)
	@echo "$$$(2)" > $(1)/commands.txt
	@. $(BIN)/activate && while read -r command; do \
		printf '\n\033[1m$$ %s\033[0m\n' "$$command"; \
		eval "nice $$command" < /dev/null || exit; \
	done < $(1)/commands.txt
	@printf '\nreport: %s/report.html\n' "$(CURDIR)/$(1)"
endef

demo: .venv/base
	$(call run_all,$(DEMO),DEMO_COMMANDS)

policy: .venv/base
	$(call run_all,$(POLICY),POLICY_COMMANDS)

libero: .venv/dev
	$(call run_all,$(LIBERO),LIBERO_COMMANDS)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadscope

test: .venv/dev
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: .venv/dev
	$(PYTEST) $(PYTEST_ARGS)

# Environments of their own, made anew each time. Tests that touch a library's inside, or its formats.
VERSIONED := tests/processing tests/models tests/policy tests/serving tests/training tests/envs tests/data/test_chat_dataset.py \
	tests/evaluation/test_rollout.py tests/evaluation/test_open_loop.py

test-newest test-oldest: test-%: .venv/dev
	rm -rf .venv-$*
	$(PYTHON) -m venv .venv-$*
	@$(BIN)/python .ci/requirements.py $* > .venv-$*/requirements.txt
	@$(BIN)/uv pip install --quiet --python .venv-$*/bin/python --requirement .venv-$*/requirements.txt
	@$(BIN)/uv pip install --quiet --python .venv-$*/bin/python --no-deps --editable .
	@$(BIN)/uv pip freeze --python .venv-$*/bin/python --exclude-editable
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
