.DEFAULT_GOAL := help
.PHONY: help install demo demo-14b test check bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

install:  ## make .venv, with DisTorch and its tools
	@scripts/install

demo: install  ## text from a language model that does not fit its 64 MB of memory
	@.venv/bin/distorch run demo --allocation "cpu,64mb;disk,*" \
		--prompt "The capital of France is" --max-new-tokens 40

demo-14b: install  ## a 14B video model denoises in 2 GB of memory; takes minutes, and 9 GB of disk
	@.venv/bin/python benchmarks/wan_14b $(ARGS)

test:  ## all tests; ARGS="-k ring" for some of them
	@scripts/test $(ARGS)

check:  ## lint, format, types, spelling
	@scripts/check

bench:  ## the benchmarks, ours beside others; ARGS="..." goes to benchmarks/run.py
	@scripts/bench $(ARGS)

clean:  ## remove .venv and everything built
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
