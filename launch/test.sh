#!/usr/bin/env bash
# Sets the environment up as quickstart.sh does, then runs the tests and the checks.
#   bash launch/test.sh                      the tests, but for the slow ones, and the checks
#   bash launch/test.sh tests/test_cli.py    what is named is handed to pytest
#   bash launch/test.sh -m slow              the slow ones
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$shapeloom_root"

# Two test processes with one thread each: tests that start ranks of their own would otherwise fight for the cores.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

echo "Running the tests"
python -m pytest -q --durations=10 -n "${SHAPELOOM_TEST_PROCESSES:-2}" "$@"
if [[ $# -eq 0 ]]; then
    echo "Checking the style (ruff)"
    python -m ruff check .
    echo "Checking the types (mypy)"
    bash launch/types.sh
fi
