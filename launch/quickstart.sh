#!/usr/bin/env bash
# The main job from nothing, on two CPU cores: set-up, data, training, samples, R-precision, report.
# Interrupted and started again, it goes on where it was. Options are passed on: --out DIR, --preset FILE.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
exec python -m shapeloom.launch.quickstart "$@"
