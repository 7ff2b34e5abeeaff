#!/usr/bin/env bash
# Writes what each program is made of (a CycloneDX bill of materials) beside its package, as
# target/debian/PACKAGE_VERSION.cdx.json. From one commit it is the same each time, wherever it is built.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(dpkg-parsechangelog -l packaging/changelog -S Version)
SOURCE_DATE_EPOCH=$(dpkg-parsechangelog -l packaging/changelog -S Timestamp)
export SOURCE_DATE_EPOCH

.ci/tools cargo-cyclonedx
PATH=$PWD/target/tools/bin:$PATH
mkdir -p target/debian

# The tool writes one file beside each Cargo.toml of the workspace.
name=pve-sandbox-sbom
clean() { find . -path ./target -prune -o -name "$name.json" -exec rm -f {} +; }
trap clean EXIT
cargo cyclonedx --quiet --format json --target "$(rustc -vV | sed -n 's/^host: //p')" \
  --override-filename "$name"
# It names our own crates by the folder that they were built in.
top=$(pwd -P)
for package in agent:pve-sandbox-agent controller:pve-sandbox-controller cli:sandboxctl; do
  rm -f "target/debian/${package#*:}"_*.cdx.json
  made=target/debian/${package#*:}_$version.cdx.json
  packaging/without-path.sh "$top" <"${package%:*}/$name.json" >"$made"
done
ls -l target/debian/*.cdx.json
