#!/usr/bin/env bash
# Installs what the browser tests look at: a browser, a VNC server, and the applications of package.json.
set -euo pipefail
cd "$(dirname "$0")"

PVE_LAB_PACKAGES="chromium tigervnc-standalone-server g++ make python3" ../lab/prepare
command -v npm >/dev/null || PVE_LAB_PACKAGES="nodejs npm" ../lab/prepare
major=$(node --print 'process.versions.node.split(".")[0]')
if [ "$major" -lt 20 ]; then
  echo "the applications need Node 20 or later, and this is $(node --version): install one first" >&2
  exit 1
fi
# `npm ci` refuses a lock without an optional package that is for Windows alone.
npm install --no-save --no-audit --no-fund --silent
# The package of the VS Code server has scripts that download from elsewhere; only the native modules that
# the server needs are built.
cd vscode
npm ci --ignore-scripts --no-audit --no-fund --silent
npm rebuild argon2 --build-from-source --silent
cd node_modules/code-server/lib/vscode
[ -d node_modules ] || npm install --omit=dev --ignore-scripts --no-audit --no-fund --silent
npm rebuild @vscode/spdlog native-watchdog --silent
# A script of its own fails after the module is built.
npm rebuild node-pty --silent || [ -f node_modules/node-pty/build/Release/pty.node ]
