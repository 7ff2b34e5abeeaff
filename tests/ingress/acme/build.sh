#!/usr/bin/env bash
# Builds Caddy with the module beside this script into a folder: `build.sh RELEASE FOLDER`. Caddy, what it needs and Go
# are those of a Debian release, which this machine's mirror must have. They are unpacked in the folder (3 GB), and
# removed after the build; nothing is installed.
set -euo pipefail
release=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
cd "$(dirname "$0")"

work=$folder/work
rm -rf "$work"
mkdir -p "$work"/{sources,lists/partial,cache/archives/partial,debs,root,caddy,main/src}
trap 'rm -rf "$work"' EXIT

mirrors=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main')
mirror=$(grep '/debian/$' <<<"$mirrors" | head -n 1)
cat >"$work/sources/release.sources" <<EOF
Types: deb deb-src
URIs: $mirror
Suites: $release
Components: main
Architectures: $(dpkg --print-architecture)
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
EOF
# Beside the machine's own packages: by these options apt knows nothing of them.
options=(-q -q -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$work/sources"
  -o Dir::State::lists="$work/lists" -o Dir::State::status=/dev/null -o Dir::Cache="$work/cache"
  -o APT::Sandbox::User=root)
apt-get "${options[@]}" update

# Of all that the build needs, Go and the libraries in Go; libraries in C are not, without cgo.
needed=$(apt-cache "${options[@]}" showsrc caddy | sed -n 's/^Build-Depends: //p' | tr ',' '\n' |
  grep -o 'golang-[^ ]*-dev')
mapfile -t packages < <(
  # shellcheck disable=SC2086 # one word for each package
  apt-get "${options[@]}" install --no-install-recommends --print-uris $needed golang-go |
    cut -d ' ' -f 2 | grep '^golang' | cut -d _ -f 1 | sort -u
)
(cd "$work/debs" && apt-get "${options[@]}" download "${packages[@]}")
for deb in "$work"/debs/*.deb; do
  dpkg-deb --extract "$deb" "$work/root"
done

# Two files of the source package are enough, and mirrors do not always have the others.
apt-get "${options[@]}" source --print-uris caddy | grep -e '\.orig\.tar\.' -e '\.debian\.tar\.' |
  while read -r uri name _ hash; do
    /usr/lib/apt/apt-helper "${options[@]}" download-file "${uri//\'/}" "$work/caddy/$name" "$hash"
  done
version=$(basename "$work"/caddy/caddy_*.orig.tar.gz .orig.tar.gz)
version=${version#caddy_}
caddy=$work/root/usr/share/gocode/src/github.com/caddyserver/caddy/v2
mkdir -p "$caddy/vendor"
tar -x -f "$work/caddy/caddy_$version.orig.tar.gz" -C "$caddy" --strip-components 1
tar -x -f "$work"/caddy/caddy_*.debian.tar.xz -C "$work/caddy"
# As in debian/rules and debian/patches: a library in the version that it needs, and no tracing.
cp -a "$work"/caddy/debian/missing-sources/* "$caddy/vendor"
sed -i '/caddyhttp\/tracing"/d' "$caddy/modules/caddyhttp/standard/imports.go"

ln -s "$PWD" "$work/main/src/caddy-acme"
echo "building Caddy $version (some minutes)"
GOROOT=$(echo "$work"/root/usr/lib/go-*)
export GOROOT GOPATH=$work/main:$work/root/usr/share/gocode GO111MODULE=off
export GOCACHE=$work/gocache GOTOOLCHAIN=local CGO_ENABLED=0
cd "$work/main/src/caddy-acme"
"$GOROOT/bin/go" build -trimpath -o "$folder/caddy" \
  -ldflags "-s -w -X github.com/caddyserver/caddy/v2.CustomVersion=v$version" .
