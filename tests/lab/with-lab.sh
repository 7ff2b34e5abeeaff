#!/usr/bin/env bash
# Runs a command beside a lab that is up: starts one if none is, and takes it down again only then.
# LAB_BUILT names the folder with the programs that run in it.
set -euo pipefail
cd "$(dirname "$0")/../.."
export LAB_DIR="${LAB_DIR:-$PWD/target/lab}"
# It installs the programs beside it.
lab=${LAB_BUILT:-target/release}/lab

was_up=yes
"$lab" status >/dev/null 2>&1 || was_up=no
finish() {
  code=$?
  if [ "$was_up" = no ]; then "$lab" down; fi
  exit "$code"
}
trap finish EXIT
# Up already or not: this also brings its programs up to date with what was just built.
"$lab" up
# Suites that also run without a lab use it only when they are told that it is there.
export PVE_SANDBOX_LAB_TESTS=1
# shellcheck disable=SC1091
. "$LAB_DIR/env"
"$@"
