#!/usr/bin/env bash
# Builds the Debian packages into target/debian from the binaries in target/dist, so that what is
# packaged is what was measured. Built twice from one commit, they are the same to the byte.
# PROFILE=release packs those that the tests have built already: to be tested, not to be shipped.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${PROFILE:-dist}
packages=("$@")
[ $# -gt 0 ] || packages=(agent controller cli)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
logged=$(dpkg-parsechangelog -l packaging/changelog -S Version)
if [ "$logged" != "$version-1" ]; then
  echo "packaging/changelog says $logged, Cargo.toml $version: they must be the same" >&2
  exit 1
fi
SOURCE_DATE_EPOCH=$(dpkg-parsechangelog -l packaging/changelog -S Timestamp)
export SOURCE_DATE_EPOCH

binary() {
  case $1 in
    agent) echo pve-sandbox-agent ;;
    controller) echo pve-sandbox-controller ;;
    cli) echo sandboxctl ;;
    *) echo "no package is made of $1" >&2 && exit 1 ;;
  esac
}
for package in "${packages[@]}"; do
  if [ ! -x "target/$profile/$(binary "$package")" ]; then
    echo "target/$profile/$(binary "$package") is missing: cargo build --profile $profile --locked -p $package" >&2
    exit 1
  fi
done

.ci/tools cargo-deb
PATH=$PWD/target/tools/bin:$PATH

# What the program itself knows best.
if [ -x "target/$profile/sandboxctl" ]; then
  rm -rf target/man target/completions
  mkdir -p target/completions
  "target/$profile/sandboxctl" man target/man
  "target/$profile/sandboxctl" completion bash >target/completions/sandboxctl
  "target/$profile/sandboxctl" completion zsh >target/completions/_sandboxctl
  "target/$profile/sandboxctl" completion fish >target/completions/sandboxctl.fish
fi

# cargo-deb takes `target/release` in a list of assets for the folder of the profile. It strips, because cargo leaves
# the symbols in a program whose crate has settings of its own in `[profile.dist.package]`, whatever `strip` says.
mkdir -p target/debian
for package in "${packages[@]}"; do
  rm -f "target/debian/$(binary "$package")"_*.deb
  cargo deb -p "$package" --profile "$profile" --no-build --strip --locked --quiet --output target/debian/
done
ls -l target/debian/*.deb
