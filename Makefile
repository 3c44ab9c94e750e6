# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make run    install, then run the quickstart jobs and show what came out
#   make test   install, then pass the default tests

PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0
# Tests wait for Ray half of their time. Files stay whole: those in one share a Ray.
SIDE_BY_SIDE := -n 2 --dist loadfile

.PHONY: run test test-slow check format lock clean

run: .venv/installed
	$(BIN)/python -m granite_ray.quickstart configs/quickstart*.yaml

test: .venv/installed
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-slow: .venv/installed
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m slow --timeout 1800

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --cov

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Everything but torch is installed as locked, with hashes. Torch is pinned alone: which build the
# pin finds (CPU or CUDA, and the CUDA libraries with it) is the platform's matter.
.venv/installed: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# Two locks: all that the tests need, and what the image in deploy/ needs.
lock: .venv/installed
	$(BIN)/python -m pip install --quiet uv
	echo "$(TORCH)" > .venv/torch.txt
	$(call LOCK,--extra dev,requirements.lock)
	$(call LOCK,--extra serve,deploy/requirements.lock)

define LOCK
$(BIN)/uv pip compile pyproject.toml $(1) --universal --python-version 3.11 \
  --generate-hashes --constraint .venv/torch.txt --no-header --no-annotate --quiet -o .venv/all.lock
@$(BIN)/python -c "import re, pathlib; \
  parts = re.split(r'(?m)^(?=[a-z0-9])', pathlib.Path('.venv/all.lock').read_text()); \
  out = re.compile(r'(torch|triton|nvidia-|cuda-)'); \
  pathlib.Path('$(2)').write_text('# Made by make lock; torch and what only it needs are left out.\n' + ''.join(p for p in parts if not out.match(p)))"
endef

clean:
	rm -rf .venv build *.egg-info out
