#!/usr/bin/env bash
# Installs what the browser tests look at: a browser, a VNC server, and the applications of package.json.
set -euo pipefail
cd "$(dirname "$0")"

PVE_LAB_PACKAGES="chromium tigervnc-standalone-server nodejs npm g++ make python3 libkrb5-dev" ../lab/prepare
npm ci --no-audit --no-fund --silent
# The package of the VS Code server has scripts that download from elsewhere; only the native modules that
# the server needs are built.
cd vscode
npm ci --ignore-scripts --no-audit --no-fund --silent
npm rebuild argon2 --build-from-source --silent
cd node_modules/code-server/lib/vscode
[ -d node_modules ] || npm install --omit=dev --ignore-scripts --no-audit --no-fund --silent
for module in @vscode/spdlog native-watchdog node-pty; do
  npm rebuild "$module" --silent
done
