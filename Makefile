# `make demo` and `make test` set up everything they need on a fresh machine.
.PHONY: demo serve test setup check fast reliability soak soak-short clean

demo: setup
	.venv/bin/dist-infer launch configs/quickstart.yaml

serve: setup
	.venv/bin/dist-infer launch configs/serve.yaml

test:
	scripts/setup-tests
	.venv/bin/python -m pytest

setup:
	scripts/setup

check: setup
	scripts/check

fast: setup
	scripts/test-fast

# docs/reliability.md from a run of every fault case (half an hour); `soak`: 30 minutes under load, with faults
reliability:
	scripts/setup-tests
	.venv/bin/python benchmarks/reliability.py --soak 300

soak:
	scripts/setup-tests
	DIST_INFER_SOAK_S=1800 .venv/bin/python -m pytest tests/reliability/test_soak.py

soak-short:
	scripts/setup-tests
	DIST_INFER_SOAK_S=300 .venv/bin/python -m pytest tests/reliability/test_soak.py

clean:
	rm -rf .venv stores build dist *.egg-info
