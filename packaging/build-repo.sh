#!/usr/bin/env bash
# Writes a signed apt repository of the packages in target/debian (DEBS) into target/repo (REPO), to be
# served by any web server as it is. KEY names the signing key in gpg's keyring: a fingerprint or an address.
# Versions that the repository has already are kept, so that a downgrade remains possible.
set -euo pipefail
cd "$(dirname "$0")/.."
# A web server, which is another user, reads it all.
umask 022

KEY=${KEY:-}
DEBS=${DEBS:-target/debian}
REPO=${REPO:-target/repo}
SUITE=stable

if [ -z "$KEY" ]; then
  echo "name the key that signs: make repo KEY=FINGERPRINT (gpg --list-secret-keys shows yours)" >&2
  exit 1
fi
if ! gpg --list-secret-keys "$KEY" >/dev/null 2>&1; then
  echo "gpg has no secret key $KEY (gpg --list-secret-keys shows yours)" >&2
  exit 1
fi
packages=("$DEBS"/*.deb)
if [ ! -e "${packages[0]}" ]; then
  echo "$DEBS has no packages: make deb" >&2
  exit 1
fi

dists=$REPO/dists/$SUITE
architecture=$(dpkg --print-architecture)
binary=main/binary-$architecture
mkdir -p "$REPO/pool" "$dists/$binary"
for package in "${packages[@]}"; do
  kept=$REPO/pool/$(basename "$package")
  # A version that others have installed never changes its content.
  if [ -e "$kept" ] && ! cmp -s "$package" "$kept"; then
    echo "$kept exists with other content: give the new packages another version" >&2
    exit 1
  fi
  install -m 0644 "$package" "$kept"
done

for materials in "$DEBS"/*.cdx.json; do
  [ ! -e "$materials" ] || install -m 0644 -D "$materials" "$REPO/sbom/$(basename "$materials")"
done

# Paths in the index are relative to the repository.
(cd "$REPO" && apt-ftparchive packages pool) >"$dists/$binary/Packages"
gzip --keep --force --no-name "$dists/$binary/Packages"
# The three files are made and signed elsewhere first: a repository that is served is never without a
# signature, and a failure leaves the last one.
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
# Release lists the other files, and neither itself nor its signatures.
cp -r "$dists" "$new/dists"
rm -f "$new"/dists/{Release,Release.gpg,InRelease}
apt-ftparchive \
  -o APT::FTPArchive::Release::Origin=pve-sandbox -o APT::FTPArchive::Release::Suite="$SUITE" \
  -o APT::FTPArchive::Release::Codename="$SUITE" -o APT::FTPArchive::Release::Components=main \
  -o APT::FTPArchive::Release::Architectures="$architecture" release "$new/dists" >"$new/Release"
gpg --batch --yes --local-user "$KEY" --clearsign --output "$new/InRelease" "$new/Release"
gpg --batch --yes --local-user "$KEY" --armor --detach-sign --output "$new/Release.gpg" "$new/Release"
install -m 0644 "$new/Release" "$new/Release.gpg" "$new/InRelease" "$dists/"
gpg --batch --yes --export "$KEY" >"$REPO/pve-sandbox.gpg"
echo "$REPO is an apt repository; pve-sandbox.gpg is its public key. On a machine that installs from it:"
echo "  /etc/apt/sources.list.d/pve-sandbox.list:"
echo "  deb [signed-by=/etc/apt/keyrings/pve-sandbox.gpg] https://REPO/ $SUITE main"
