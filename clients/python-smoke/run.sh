#!/usr/bin/env bash
# Runs smoke.py against the controller that SANDBOXCTL_* name. Python's gRPC goes into a virtual environment
# below target/, and the client is generated from the .proto files at each run: it cannot fall behind them.
set -euo pipefail
cd "$(dirname "$0")/../.."
requirements=clients/python-smoke/requirements.txt
venv=target/python generated=target/python-client

# The copy is written last: an installation that was interrupted is made again.
if ! cmp -s "$requirements" "$venv/requirements.txt"; then
  rm -rf "$venv"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: -r "$requirements"
  cp "$requirements" "$venv/requirements.txt"
fi
rm -rf "$generated"
mkdir -p "$generated"
"$venv/bin/python" -m grpc_tools.protoc -I proto --python_out="$generated" --grpc_python_out="$generated" \
  proto/sandbox/v1/*.proto
PYTHONPATH=$generated exec "$venv/bin/python" clients/python-smoke/smoke.py
