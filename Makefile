# Two commands for everyone: `make demo` and `make test`. Both install what they need into .venv.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
SEEDS ?= 0 1 2

.PHONY: demo demo-seeds real test test-train test-faults test-cluster fuzz bench bench-peers scale check clean

demo: $(VENV)/.installed
	$(BIN)/selfalign run recipes/demo.yaml

# The demo's marks over three seeds, side by side.
demo-seeds: $(VENV)/.installed
	for seed in $(SEEDS); do $(BIN)/selfalign run recipes/demo.yaml seed=$$seed --run runs/demo-$$seed >/dev/null || exit; done
	$(BIN)/python benchmarks/demo_marks.py $(SEEDS:%=runs/demo-%)

# The loop on a real language model, SmolLM2-135M; stopped, the same command goes on. With DATA=FOLDER it reads
# guanaco/oa_questions.jsonl and lima/train.jsonl there, else the Hub's; MODEL names another folder or the Hub's model.
# Two threads that wait for each other by spinning take twice the time where other work shares the cores.
real: export OMP_WAIT_POLICY ?= passive
real: $(VENV)/.installed-real
	model=$(or $(MODEL),$$($(BIN)/selfalign demo smollm2)) && \
	$(BIN)/selfalign run recipes/lima150-smollm2-135m.yaml --run runs/real "model.path=$$model" $(if $(DATA),\
	    prepare.seed.path=$(DATA)/guanaco/oa_questions.jsonl prepare.corpus.path=$(DATA)/lima/train.jsonl)
	$(BIN)/selfalign show runs/real
	$(BIN)/selfalign report runs/real

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

# Trainings in two processes, and trainings that are killed, N times each; more than 3 run all combinations of settings.
test-train: N ?= 3
test-train: $(VENV)/.installed-dev
	TRAIN_KILLS=$(N) $(BIN)/python -m pytest -m train $(ARGS)

# Runs go on while N workers, actors, nodes, drivers and heads are killed; and processes at their writes, 8 N times.
test-faults: N ?= 20
test-faults: $(VENV)/.installed-dev
	FAULT_KILLS=$(N) $(BIN)/python -m pytest -m faults $(ARGS)

# Ray clusters of several nodes: where workers are placed, what strangers get to see, and jobs that are submitted, one
# of which is killed N times.
test-cluster: N ?= 3
test-cluster: $(VENV)/.installed-dev
	JOB_KILLS=$(N) $(BIN)/python -m pytest -m cluster $(ARGS)

# N mutated files of every kind through the readers; `make test` runs 200.
fuzz: N ?= 2000
fuzz: $(VENV)/.installed-dev
	FUZZ_CASES=$(N) $(BIN)/python -m pytest tests/data/test_fuzz.py

# `make bench ROW=5`, or all that are built.
bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/run.py $(ROW)

# What a row costs and what the driver holds, at 10,000 rows and at N.
scale: N ?= 100000
scale: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/scale.py 10000 $(N) $(ARGS)

# What the benchmarks compare with and our own environment cannot hold: row 2 needs it.
bench-peers: .venv-distilabel/.installed

.venv-distilabel/.installed: benchmarks/peers/distilabel.txt
	python3 -m venv .venv-distilabel
	.venv-distilabel/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) runs build dist

$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-real: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,gguf,ray,s3,deepspeed]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,ray]'
	touch $@
