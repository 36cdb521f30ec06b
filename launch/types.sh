#!/usr/bin/env bash
# Type-checks the package with mypy. The repository's root is the package, whatever the checkout is called, so mypy is
# given it under its own name.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir "$work/path"
for name in "$root"/*.py "$root"/{models,data_pipes,checkpoints,training,eval,launch}; do
    mkdir -p "$work/path/shapeloom"
    ln -s "$name" "$work/path/shapeloom/$(basename "$name")"
done
cd "$work/path"
MYPYPATH="$work/path" python -m mypy --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" -p shapeloom
