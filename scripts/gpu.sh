#!/usr/bin/env bash
# Sets everything up and runs the tests that need a CUDA device; without one nothing runs. Further arguments go to pytest.
source "$(dirname "$0")/environment.sh"
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "nothing ran: torch sees no CUDA device here"
    exit 0
fi
python -m pytest -q -rs -m gpu "$@"
