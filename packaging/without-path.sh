#!/usr/bin/env bash
# Copies stdin to stdout with /pve-sandbox in the place of a directory, in whichever way it is written
# there: as it is, or with some of its characters percent-encoded, once or twice.
#
#   packaging/without-path.sh DIRECTORY <in >out
set -euo pipefail
export LC_ALL=C

mark=$'\x01'
read -ra bytes < <(printf '%s' "${1:?which directory}" | od -An -v -tx1 | tr -d '\n'; echo)
pattern=
for byte in "${bytes[@]:1}"; do
  printf -v raw '%b' "\\x$byte"
  # shellcheck disable=SC1003 # a backslash, and no quote
  case $raw in ['.[]*^$+?(){}|\']) raw="\\$raw" ;; esac
  pattern+="($raw|%(25)?$byte)"
done
# The first byte is the slash, which says how the others are written.
exec sed -E -e "s$mark/$pattern$mark/pve-sandbox${mark}Ig" \
  -e "s$mark(%(25)?2F)$pattern$mark\\1pve-sandbox${mark}Ig"
