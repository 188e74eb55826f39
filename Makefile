# Everything sets itself up: `make demo` and `make test` work on a fresh clone with Python, git and make alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.14.1 torchvision==0.29.1

.PHONY: help demo demo-timm check test fuzz test-without-triton test-oldest lint hooks wheel release bench peers results \
	experiments map gpu docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 24

# torch is installed first and by itself, so that nothing else decides which one it is.
$(BIN)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	touch $@

# $(BIN)/.test and its like: the package with that extra of pyproject.toml.
$(BIN)/.%: $(BIN)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

demo: $(BIN)/.examples  ## train a small language model with AdamW and with CautiousDecay(AdamW): about two minutes
	$(BIN)/python examples/language_model.py

demo-timm: $(BIN)/.examples  ## classify digits with timm's adamw and cautious_adamw: about a minute
	$(BIN)/python examples/with_timm.py

# The longest files first: at the end no processor waits for one of them.
LONGEST := $(addprefix tests/test_,$(addsuffix .py,gpu_proof triton_compiled timm kernels experiments updates pieces))
test: $(BIN)/.test  ## all tests
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 tests/test_kernels.py tests/test_triton_values.py -k triton
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
		$(LONGEST) $(filter-out $(LONGEST),$(sort $(wildcard tests/test_*.py)))

# Neither what starts processes or compiles at length, nor other libraries: half a minute on two processors.
CHECKED := $(addprefix tests/test_,$(addsuffix .py,closures exceptions layout masks methods paths project public rules \
	sequences tensors weight_decay))
check: lint $(BIN)/.test  ## lint and the core tests: about a minute
	$(BIN)/python -m pytest -q -n 2 -m 'not process and not slow' $(CHECKED)

# Two processes, and two files of which each takes as many seconds as it is told.
fuzz: $(BIN)/.test  ## random events and sequences for about SECONDS (600); prints a seed and the shortest that fails
	FUZZ_SECONDS=$(or $(SECONDS),600) $(BIN)/python -m pytest -q -n 2 tests/test_plan.py tests/test_sequences.py \
		-k "random_events or random_sequences"

# The package with torch alone, in virtual environments of their own. They need not repeat what depends neither on torch's
# version nor on what is missing: texts and pages, the examples and the study, the maths of the siblings, interrupts (of
# Python's own lines) and the search for random sequences. Engines on ranks: make test has them on the newest torch.
# CI's workflow runs these files, too, without triton and numba and on the oldest torch.
CORE := $(addprefix --ignore=tests/test_,$(addsuffix .py,anchor convergence docs examples experiments gpu_proof \
	interrupts layout loggers pictures project public ranks recipes recipes_page results sequences \
	siblings_in_one_pass your_own_method))

$(VENV)-cpu/.core: pyproject.toml
	test -d $(VENV)-cpu || $(PYTHON) -m venv $(VENV)-cpu
	$(VENV)-cpu/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
	$(VENV)-cpu/bin/python -m pip install --quiet --disable-pip-version-check pytest pytest-xdist hypothesis -e .
	$(VENV)-cpu/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes triton
	touch $@

# torch 2.4.1 was built for numpy 1.
$(VENV)-oldest/.core: pyproject.toml
	test -d $(VENV)-oldest || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check torch==2.4.1 'numpy<2'
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check pytest pytest-xdist hypothesis -e .
	touch $@

test-without-triton: $(VENV)-cpu/.core  ## the core tests without triton, numba and the optimizer libraries
	$(VENV)-cpu/bin/python -m pytest -q -n 2 $(CORE)

test-oldest: $(VENV)-oldest/.core  ## the core tests on the oldest torch that is supported (Python 3.12 or older)
	$(VENV)-oldest/bin/python -m pytest -q -n 2 $(CORE)

lint: $(BIN)/.lint  ## format, lint, types, spelling and workflows
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/zizmor --quiet --offline .github

hooks: $(BIN)/.lint  ## what `pre-commit` checks beside `make lint`, on all files
	SKIP=lint $(BIN)/pre-commit run --all-files

wheel: $(VENV)-cpu/.core  ## wheel and sdist in dist/, their contents checked and the README's example run
	$(VENV)-cpu/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dist]'
	$(VENV)-cpu/bin/python .ci/wheel.py

release: wheel  ## can this commit be released? version, changelog, tag and the files of `make wheel`; publishes nothing
	$(VENV)-cpu/bin/python .ci/release.py

bench: $(BIN)/.examples  ## step time, memory and import time against the plain optimizer
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/first_step.py

peers: $(BIN)/.peers  ## step time beside other libraries with cautious decay
	$(BIN)/python benchmarks/peers.py

results: $(BIN)/.results  ## what results/runs.csv lacks of docs/protocol.md (all of it: 70 minutes), then docs/results.md
	$(BIN)/python results/study.py
	$(BIN)/python results/report.py

# The lengths are those of docs/experiments.md.
EXPERIMENTS := toy_landscapes lyapunov mask_ablation sparsity anchor when_not grokking
experiments: $(BIN)/.results  ## the experiments of docs/experiments.md, tables and pictures in demo/: half an hour
	for name in $(EXPERIMENTS); do $(BIN)/python examples/$$name.py || exit; done
	$(BIN)/python examples/convergence.py --lengths 300 600 1200
	$(BIN)/python examples/bfloat16.py

map: $(BIN)/.results  ## what results/map lacks of docs/map_protocol.md (all of it: 80 minutes), then docs/map.md
	$(BIN)/python results/map_study.py
	$(BIN)/python results/map_report.py

# No set-up here: machines with cards often have torch, triton and pytest, and no network.
gpu:  ## on a machine with a card: its tests, then a proof of at most eight minutes, in gpu_proof/
	PYTHONPATH=. $(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu_proof.py

docs: $(BIN)/.docs  ## the pages and the API as a site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

clean:  ## remove what the targets made
	rm -rf $(VENV) $(VENV)-cpu $(VENV)-oldest demo dist site gpu_proof .pytest_cache .mypy_cache .ruff_cache .hypothesis
