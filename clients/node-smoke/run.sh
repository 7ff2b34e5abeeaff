#!/usr/bin/env bash
# Runs the smoke test against the controller that SANDBOXCTL_* name.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d node_modules ] && [ -d gen ] || npm ci --no-audit --no-fund --silent
exec node node-smoke/smoke.mjs
