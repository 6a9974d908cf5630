# Two commands do everything: `make sample` and `make test`. Both create .venv and install into it, nothing else.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: sample test clean

# Threads that wait for others must not take their processor.
export OMP_WAIT_POLICY ?= passive

sample: .venv/.ready
	$(PY) sample.py --image examples/creature.png --prompt "a creature is jumping in the snow" --adapter checkpoints/toy/switch \
	    --out samples/switch.gif
	$(PY) sample.py --image examples/creature.png --prompt "a golden creature is moving right in the sea" --model checkpoints/toy/sugar \
	    --out samples/sugar.gif

test: .venv/.ready-test
	$(PY) -m pytest -n 2 --dist worksteal

.venv/bin/python:
	$(PYTHON) -m venv .venv || { echo "Python needs its venv module: on Debian, apt install python3-venv."; rm -rf .venv; exit 1; }

.venv/.ready: pyproject.toml | .venv/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/.ready-test: pyproject.toml | .venv/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@ .venv/.ready

clean:
	rm -rf .venv samples .pytest_cache .hypothesis __pycache__ tests/__pycache__
