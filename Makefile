# make demo    the whole recipe in minutes: record, train, evaluate; open runs/demo/report.html
# make test    all tests
# make lint    ruff

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint
.DELETE_ON_ERROR:

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	@echo "installing into .venv: a few gigabytes, a few minutes"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

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

demo: .venv/installed
	@mkdir -p $(DEMO)
	@echo "$$DEMO_COMMANDS" > $(DEMO)/commands.txt
	@. $(BIN)/activate && while read -r command; do \
		printf '\n\033[1m$$ %s\033[0m\n' "$$command"; \
		eval "$$command" < /dev/null || exit; \
	done < $(DEMO)/commands.txt
	@printf '\nreport: %s/report.html\n' "$(CURDIR)/$(DEMO)"

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses auto --dist loadscope $(PYTEST_ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
