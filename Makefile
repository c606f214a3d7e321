.PHONY: quality style test test-slow

quality:
	ruff check . && ruff format --check .

style:
	ruff check --fix . && ruff format .

test:
	python -m pytest

test-slow:
	python -m pytest -m "slow and not gpu"
