#!/usr/bin/env bash
# Runs the end-to-end tests and the clients of an earlier version against a lab in which one daemon is of
# this version: first its agents, then its controller. What worked before must work with either.
#
#   tests/versions.sh [COMMIT] [FILTER]
#
# COMMIT is the earlier version, and FILTER an expression of nextest for the tests of the lab (default: all).
# Without COMMIT it is the newest release tag; without one, the commit before the last addition to the API,
# which is the newest version that callers can tell from this one. The earlier version is built in a
# worktree with a target directory of its own, target/versions/before, which is kept for the next run.
set -euo pipefail
cd "$(dirname "$0")/.."
top=$PWD
work=$top/target/versions
old=$work/before

die() {
  echo "versions: $*" >&2
  exit 1
}

# Prints the commit to compare with.
before() {
  if [ -n "${1-}" ]; then
    git rev-parse --verify --quiet "$1^{commit}" || die "there is no commit $1"
    return
  fi
  tag=$(git describe --tags --match 'v*' --abbrev=0 HEAD^ 2>/dev/null || true)
  if [ -n "$tag" ]; then
    git rev-parse "$tag^{commit}"
    return
  fi
  added=$(git log -1 --format=%H -- proto/sandbox.v1.binpb)
  [ -n "$added" ] || die "no commit has changed proto/sandbox.v1.binpb: name one"
  git rev-parse --verify --quiet "$added^" || die "$added has none before it: is this a shallow clone?"
}

# Makes a folder of programs: those of the earlier version, but one of this version.
mixed() {
  dir=$work/$1
  rm -rf "$dir"
  mkdir -p "$dir"
  for program in lab pct pve-sandbox-agent pve-sandbox-controller sandboxctl; do
    cp "$old/target/release/$program" "$dir/"
  done
  cp "$top/target/release/$2" "$dir/"
  echo "$dir"
}

# Runs the suite of the earlier version with the programs of a folder, in a lab of its own.
suite() {
  echo "versions: $1, from $2"
  # The lab is that of the earlier version, as are its tests: both know what that version writes.
  (
    cd "$old"
    export LAB_BUILT=$2 LAB_DIR=$work/lab
    # shellcheck disable=SC2016 # expanded by the inner shell
    tests/lab/with-lab.sh bash -euo pipefail -c '
      cargo nextest run --release --locked --workspace --no-fail-fast --test lxc -E "$1"
      clients/node-smoke/run.sh
      clients/python-smoke/run.sh' bash "$filter"
  )
}

[ "$(id -u)" -eq 0 ] || die "run this as root: the lab makes namespaces, mounts and containers"
commit=$(before "${1-}")
filter=${2:-all()}
[ "$commit" != "$(git rev-parse HEAD)" ] || die "$commit is the version that is checked out"
for program in pve-sandbox-agent pve-sandbox-controller; do
  [ -x "target/release/$program" ] || die "target/release/$program is missing: make build"
done
echo "versions: $(git log -1 --format='%h %s' "$commit") is the version before"

mkdir -p "$work"
git worktree prune
if [ -e "$old/.git" ]; then
  git -C "$old" checkout --quiet --detach "$commit"
else
  git worktree add --quiet --detach "$old" "$commit"
fi
unset CARGO_TARGET_DIR
(
  cd "$old"
  # All targets at once, as `make test` does: with other packages selected, dependencies are built again.
  cargo build --release --locked --workspace --all-targets
  make clients
)

failed=
agents=$(mixed new-agent pve-sandbox-agent)
controller=$(mixed new-controller pve-sandbox-controller)
suite "new agents, old controller" "$agents" || failed="$failed new-agent"
suite "new controller, old agents" "$controller" || failed="$failed new-controller"
[ -z "$failed" ] || die "failed with:$failed"
echo "versions: both ways are green"
