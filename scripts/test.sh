#!/usr/bin/env bash
# Sets everything up, lints, checks types and runs the tests. Further arguments go to pytest.
source "$(dirname "$0")/environment.sh"
ruff check .
ruff format --check .
mypy & # beside the tests
export OMP_NUM_THREADS=1 # a core for each of pytest's workers
python -m pytest -q --numprocesses auto --dist worksteal "$@"
wait $!
