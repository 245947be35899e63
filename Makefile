.PHONY: check format test bench results demo

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
	semiperm bench sampling --json benchmarks/results/sampling.json
	semiperm bench kernels --json benchmarks/results/kernels.json

results:
	semiperm bench results

demo:
	semiperm demo
