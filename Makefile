# Every target sets up .venv first. PYTHON=python3.12 picks another interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
UNFINISHED := .venv/.unfinished# by an interrupted set-up, which pip cannot go on with: made anew
NOW := $(shell date +%Y-%m-%d_%H-%M-%S)
SLOW := slow or multiprocess
PRETRAIN := outputs/pretrain
# A process a core, each with one thread: a file of tests shares what is costly to make. In the order of their names: by
# number of tests the longest, which are few, would come last, and one core would wait.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help setup quickstart app test test-fast test-thorough test-faults coverage eval bench methods-table lint docs docs-commands pretrain

help:
	@echo "make quickstart        fine-tune, distil and evaluate the embedded pipeline, 8 minutes on two cores"
	@echo "make app               draw in the browser, teacher and students side by side; more in ARGS=..."
	@echo "make test              the tests; make test-fast leaves out the slow ones"
	@echo "make test-thorough     further settings of slow tests, ten minutes"
	@echo "make test-faults       the long tests of faults: runs killed at random, damaged files and networks"
	@echo "make coverage          all tests, and which lines of the package they run: at least 90 %, in htmlcov/"
	@echo "make eval RUN=...      evaluate a run folder; more arguments in ARGS=..."
	@echo "make bench             step time, memory, FLOPs; peer=PATH runs diffusers' script beside; more in ARGS=..."
	@echo "make methods-table     every distillation from one teacher at one price, two hours; more in ARGS=..."
	@echo "make lint              style and types"
	@echo "make docs              these pages as a site: site/index.html"
	@echo "make docs-commands     run every command of README and docs that can run here, an hour; PAGES=drawing.md some"
	@echo "make pretrain          train the embedded pipeline from scratch, hours; goes on where it was stopped"

# Asked first: setting up takes minutes.
ifneq ($(filter eval,$(MAKECMDGOALS)),)
ifeq ($(wildcard $(RUN)/config.yaml),)
$(error RUN=$(RUN): no run folder; give RUN=outputs/<experiment>/<date_time>)
endif
endif

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "PYTHON=$(PYTHON): \
	expected Python 3.11 or newer, which diffusers needs; name one, as in: make setup PYTHON=python3.12" >&2; exit 2; }
	$(if $(wildcard $(UNFINISHED)),rm -rf .venv)
	@# One that was not made here is not marked, so that it is never removed.
	@[ -e .venv ] && [ ! -e $@ ] || { mkdir -p .venv && touch $(UNFINISHED); }
	@{ $(PYTHON) -m venv .venv && \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"; } || { echo ".venv: \
	could not be made, as said above; mend that, or remove the folder, and run make setup again" >&2; exit 2; }
	@rm -f $(UNFINISHED) && touch $@

# Two processes, each with half of a batch: threads of one would leave a core idle for a quarter of the time.
TWO_CORES := trainer=ddp_sim data.batch_size=8

quickstart: $(READY)
	$(BIN)/python train.py experiment=quickstart_lora $(TWO_CORES) hydra.run.dir=outputs/quickstart_lora/$(NOW)
	$(BIN)/python train.py experiment=quickstart $(TWO_CORES) method.teacher_lora=outputs/quickstart_lora/$(NOW) \
		hydra.run.dir=outputs/quickstart/$(NOW)
	$(BIN)/python evaluate.py run=outputs/quickstart/$(NOW) evaluation=quick evaluation.num_images=null \
		logger=csv accelerator=cpu devices=2

app: $(READY)
	@$(BIN)/python -c 'from importlib.util import find_spec; import sys; sys.exit(find_spec("gradio") is None)' || \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[app]"
	$(BIN)/python -m lcm_lightning.app $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-fast: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) -m "not ($(SLOW) or faults or thorough)" $(ARGS)

test-thorough: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) -m thorough $(ARGS)

test-faults: $(READY)
	$(BIN)/python -m pytest -m faults -s $(ARGS)

coverage: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) -m "not faults" --cov --cov-report=term --cov-report=html --durations=20 $(ARGS)

eval: $(READY)
	$(BIN)/python evaluate.py run=$(RUN) $(ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks $(if $(peer),peer=$(peer)) $(ARGS)

methods-table: $(READY)
	$(BIN)/python -m benchmarks.methods $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The extra [docs] is installed where it is missing. NO_MKDOCS_2_WARNING: without Material's banner about its successor.
docs: $(READY)
	@$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null || \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-commands: $(READY)
	$(BIN)/python scripts/run_documented_commands.py $(PAGES) $(ARGS)

# Each stage is skipped where its network lies, and resumed where its checkpoint does.
stage = $(BIN)/python train.py experiment=pretrain_$(1) hydra.run.dir=$(PRETRAIN)/$(1) \
	$(if $(wildcard $(PRETRAIN)/$(1)/checkpoints/last.ckpt),resume=$(PRETRAIN)/$(1))

pretrain: $(PRETRAIN)/unet/pipeline/model_index.json
	$(BIN)/python scripts/pack_tiny_pipeline.py --pipeline $(PRETRAIN)/unet/pipeline --clip $(PRETRAIN)/clip/clip \
		--output $(PRETRAIN)/assets

$(PRETRAIN)/vae/vae/config.json: | $(READY)
	$(call stage,vae)

$(PRETRAIN)/clip/clip/config.json: | $(READY)
	$(call stage,clip)

$(PRETRAIN)/unet/pipeline/model_index.json: $(PRETRAIN)/vae/vae/config.json $(PRETRAIN)/clip/clip/config.json
	$(call stage,unet) method.vae=$(PRETRAIN)/vae/vae method.clip=$(PRETRAIN)/clip/clip
