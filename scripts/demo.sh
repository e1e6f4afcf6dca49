#!/usr/bin/env bash
# Sets everything up, prunes the bundled Llama to 2:4 and checks the result. Further arguments go to llmprune.
source "$(dirname "$0")/environment.sh"
python -m llmprune --model llama --sparsity 0.5 --pattern 2:4 "$@"
