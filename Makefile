# `make demo` and `make test` set up everything they need on a fresh machine.
.PHONY: demo serve test setup check fast clean

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

clean:
	rm -rf .venv stores build dist *.egg-info
