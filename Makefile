.PHONY: quality style test test-slow api

quality:
	ruff check . && ruff format --check . && python -m mypy

style:
	ruff check --fix . && ruff format .

test:
	python -m pytest

test-slow:
	python -m pytest -m "slow and not gpu"

api:
	EAGER_IMPORT=1 python -W error -m pdoc --docformat google --output-directory build/api hnml_hf hnml_hf.noise hnml_hf.modeling.cam hnml_hf.objectives.inner_step \
		hnml_hf.objectives hnml_hf.data
