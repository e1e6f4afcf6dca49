# Sourced by the other scripts: makes .venv with everything that llmprune and its tests need, once.
# Needs Python 3.11 or newer with pip; PYTHON chooses another interpreter, TRANSFORMERS another version (in an environment of its own).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${LLMPRUNE_VENV:-.venv${TRANSFORMERS:+-transformers-$TRANSFORMERS}}"
stamp="$venv/.llmprune-$(cksum < pyproject.toml | tr ' ' '-')"
if [ ! -e "$stamp" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON" >&2; exit 2; }
    "${PYTHON:-python3}" -m venv "$venv"
    # without a GPU the newest torch would bring gigabytes of CUDA libraries along
    if command -v nvidia-smi > /dev/null; then torch="torch"; else torch="torch==2.13.0"; fi
    # what is imported is compiled then; all of it would take as long as fetching it
    install_with() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$torch" ${TRANSFORMERS:+"transformers==$TRANSFORMERS"} --editable "$1"; }
    install_with ".[test,quantised]" || { echo "no compressed-tensors to be had here: its tests are skipped" >&2; install_with ".[test]"; }
    touch "$stamp"
fi
export PATH="$PWD/$venv/bin:$PATH"
export PYTHONDONTWRITEBYTECODE= # what is imported is compiled once, not by every process again
