.PHONY: check format test bench demo

check:
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .

test:
	pytest

bench:
	semiperm bench membranes --json benchmarks/results/membranes.json

demo:
	semiperm demo
