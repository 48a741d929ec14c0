# The whole line, one word each. The host side lives in .venv; everything a stage needs lives in its own image.

RECIPE ?= annie
PYTHON ?= python3
PORT   ?= 8000
# docker or local; empty: docker where an engine answers
EXECUTOR ?=

BUILD := .venv/bin/python build.py

.PHONY: help demo test model serve chat plan status doctor lock clean

help:
	@echo "make demo    the whole line on a small model, from nothing to an answer from vLLM (CPU, about 7 minutes)"
	@echo "make test    every test this machine can run"
	@echo "make model   recipes/annie.yaml in containers, on a DGX Spark; RECIPE=tiny for the small model"
	@echo "make serve   the newest serving image of RECIPE, on 127.0.0.1:$(PORT)"
	@echo "make chat    a chat with what is being served"
	@echo "make doctor  what this machine has, and what it lacks"

demo: .venv/.ready
	@$(BUILD) demo --recipe tiny --executor local

test: .venv/.ready .venv/.tests
	@.venv/bin/python tests/run.py

model: .venv/.ready
	@$(BUILD) run --recipe $(RECIPE) --executor docker

serve: .venv/.ready
	@$(BUILD) serve --recipe $(RECIPE) --port $(PORT) $(EXECUTOR:%=--executor %)

chat: .venv/.ready
	@$(BUILD) chat --url http://127.0.0.1:$(PORT)

plan status doctor: .venv/.ready
	@$(BUILD) $@ --recipe $(RECIPE)

# The environment is whole when its stamp is there; a half-made one is finished by the next make.
.venv/.ready: host.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"found Python {sys.version.split()[0]}; expected 3.11 or newer. Run make PYTHON=python3.11")'
	@echo "making .venv"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -qq --require-hashes -r host.lock
	@touch $@

.venv/.tests: tests/requirements.lock .venv/.ready
	@.venv/bin/python -m pip install -qq --require-hashes -r tests/requirements.lock
	@touch $@

lock: .venv/.ready
	.venv/bin/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-emit-index-url --no-emit-find-links --no-annotate host.in -o host.lock
	.venv/bin/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-emit-index-url --no-emit-find-links --no-annotate tests/requirements.in -o tests/requirements.lock

# Artifacts and environments stay in .annie (or $$ANNIE_HOME): they cost minutes or days, so deleting them is left to you.
clean:
	rm -rf .venv
	find . -name __pycache__ -not -path './.annie/*' -type d -prune -exec rm -rf {} +
