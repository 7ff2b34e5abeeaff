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

# cargo-deb writes no md5sums, by which `dpkg --verify` finds changed files. Adds those of all files: there are no
# conffiles. What it builds depends on neither clock nor umask.
add_md5sums() {
  local unpacked=target/unpacked
  rm -rf "$unpacked"
  dpkg-deb --raw-extract "$1" "$unpacked"
  (cd "$unpacked" && find . -type f ! -path './DEBIAN/*' -printf '%P\n' |
    LC_ALL=C sort | xargs -d '\n' md5sum >DEBIAN/md5sums)
  chmod 644 "$unpacked/DEBIAN/md5sums"
  chmod 755 "$unpacked" "$unpacked/DEBIAN"
  find "$unpacked" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
  dpkg-deb --root-owner-group -Zxz --build "$unpacked" "$1" >/dev/null
  rm -r "$unpacked"
}

# cargo-deb takes `target/release` in a list of assets for the folder of the profile. It strips, because cargo leaves
# the symbols in a program whose crate has settings of its own in `[profile.dist.package]`, whatever `strip` says.
# How well it compresses does not matter: dpkg-deb builds the package again.
mkdir -p target/debian
for package in "${packages[@]}"; do
  name=$(binary "$package")
  rm -f "target/debian/$name"_*.deb
  cargo deb -p "$package" --profile "$profile" --no-build --strip --locked --quiet --output target/debian/ \
    --compress-type gz --fast --compress-system
  add_md5sums "target/debian/$name"_*.deb
done
ls -l target/debian/*.deb
