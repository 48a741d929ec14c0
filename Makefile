# The whole line, one word each. The host side lives in .venv; everything a stage needs lives in its own image.

RECIPE ?= annie
PYTHON ?= python3
PORT   ?= 8000
# an address to serve on, and a file with the key that clients send; empty: 127.0.0.1 and none
BIND   ?=
KEY    ?=
# docker or local; empty: docker where an engine answers
EXECUTOR ?=

BUILD := .venv/bin/python build.py
# What was built last is planned, shown and served, unless RECIPE says another.
NAMED := $(if $(filter file,$(origin RECIPE)),,--recipe $(RECIPE))

.PHONY: help demo test lint long chaos mutants model warm serve chat plan status doctor arm64 requirements parameters clean FORCE

help:
	@echo "make demo    the whole line on a small model, from nothing to an answer from vLLM (CPU, about 10 minutes)"
	@echo "make test    every test this machine can run"
	@echo "make lint    ruff (rules and format) and mypy, as .ci/run does"
	@echo "make long    what make test leaves out: other CPUs' numerics, the line in containers (an hour)"
	@echo "make chaos   bad requests, hang-ups, kills and flipped bits (two hours; CHAOS=--short: few)"
	@echo "make mutants breaks critical lines one by one; a test has to notice (15 minutes)"
	@echo "make model   recipes/annie.yaml in containers, on a DGX Spark; RECIPE=tiny for the small model"
	@echo "make warm    compiles what stage train of RECIPE runs on this GPU, so that it starts at once"
	@echo "make serve   what was built last, or RECIPE, on 127.0.0.1:$(PORT); BIND and KEY open it"
	@echo "make chat    a chat with what is being served"
	@echo "make doctor  what this machine lacks for RECIPE (annie)"
	@echo "make arm64   what can be checked of aarch64 without such a machine, under emulation"

demo: .venv/.ready
	@$(BUILD) demo --recipe tiny --executor local

test: .venv/.ready .venv/.tests
	@.venv/bin/python tests/run.py

lint: .venv/.ready .venv/.lint
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/python tests/lint.py

# Needs what make demo has built; for kills of the image build also make model RECIPE=tiny.
chaos: .venv/.ready .venv/.tests
	@.venv/bin/python tests/chaos/run.py $(CHAOS)

# Not in .ci/run either: the small line once for each kind of CPU that torch can be held to, and once more in containers.
long: .venv/.ready .venv/.tests
	@ANNIE_TEST_LONG=1 .venv/bin/python tests/run.py tests/line/test_numerics.py tests/line/test_evening.py tests/line/test_docker_line.py

# Not in .ci/run either. WORDS chooses entries of tests/mutants.toml: make mutants WORDS=forge/store.py
mutants: .venv/.ready .venv/.tests
	@.venv/bin/python tests/mutants.py $(WORDS)

model: .venv/.ready
	@$(BUILD) run --recipe $(RECIPE) --executor docker

warm: .venv/.ready
	@$(BUILD) warm --recipe $(RECIPE) $(EXECUTOR:%=--executor %)

serve: .venv/.ready
	@$(BUILD) serve $(NAMED) --port $(PORT) $(EXECUTOR:%=--executor %) $(BIND:%=--bind %) $(KEY:%=--api-key-file %)

chat: .venv/.ready
	@$(BUILD) chat --url http://127.0.0.1:$(PORT) $(KEY:%=--api-key-file %)

plan status: .venv/.ready
	@$(BUILD) $@ $(NAMED)

doctor: .venv/.ready
	@$(BUILD) doctor --recipe $(RECIPE)

# forge/venv.py decides whether .venv stays. A PYTHON that you name must be the one that it was made with.
.venv/.ready: FORCE
	@command -v $(PYTHON) >/dev/null || { echo "python: found no $(PYTHON); expected Python 3.11 to 3.14. Install one, or name it: make demo PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) forge/venv.py $(if $(filter file,$(origin PYTHON)),,--this-python)

FORCE:

.venv/.tests: tests/requirements.lock .venv/.ready
	@.venv/bin/python -m pip install -qq --require-hashes -r tests/requirements.lock
	@touch $@

.venv/.lint: tests/lint.lock .venv/.ready
	@.venv/bin/python -m pip install -qq --require-hashes -r tests/lint.lock
	@touch $@

# Not in .ci/run: linux/arm64 under emulation takes most of an hour. ANNIE_ARM64_BASE names a base image for it (docs/arm64.md).
arm64: .venv/.ready
	@.venv/bin/python tests/arm64/run.py

requirements: .venv/.ready
	.venv/bin/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-emit-index-url --no-emit-find-links --no-annotate host.in -o host.lock
	.venv/bin/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-emit-index-url --no-emit-find-links --no-annotate tests/requirements.in -o tests/requirements.lock
	.venv/bin/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-emit-index-url --no-emit-find-links --no-annotate tests/lint.in -o tests/lint.lock
	.venv/bin/uv pip compile --quiet --generate-hashes --python-version 3.11 --python-platform aarch64-manylinux_2_28 --excludes images/torch-aarch64.excludes.txt --no-header --no-emit-index-url --no-emit-find-links --no-annotate images/torch-aarch64.in -o images/torch-aarch64.lock

# stages/<name>/parameters.py from each stage.toml; tests/forge/test_typed_parameters.py says when one is out of date.
parameters: .venv/.ready
	@.venv/bin/python -m forge.typed_parameters

# Artifacts and environments stay in .annie (or $$ANNIE_HOME): they cost minutes or days, so deleting them is left to you.
clean:
	rm -rf .venv
	find . -name __pycache__ -not -path './.annie/*' -type d -prune -exec rm -rf {} +
