.PHONY: quality style test test-slow docs

quality:
	ruff check . && ruff format --check . && python -m mypy

style:
	ruff check --fix . && ruff format .

test:
	python -m pytest

test-slow:
	python -m pytest -m "slow and not gpu"

docs:
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict
