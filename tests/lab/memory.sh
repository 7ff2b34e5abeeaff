#!/usr/bin/env bash
# Runs the lab's tests in a loop for so many minutes, then looks at the memory of the agents that
# lived through all of it. Tests that end agents are left out: a new agent is small.
#
#   tests/lab/with-lab.sh tests/lab/memory.sh MINUTES
set -euo pipefail
minutes=${1:?how many minutes}
max_kib=$((25 * 1024))
lab=target/release/lab
ending='test(/^(crash|kills|recover|nodes|events)::/) | test(kill) | test(power)'

# "NODE PID KIB" for each agent: the process is found by its program and its sub-command.
agents() {
  for node in node1 node2 node3; do
    # shellcheck disable=SC2016 # expanded in the node
    "$lab" exec "$node" -- sh -c '
      for p in /proc/[0-9]*; do
        [ "$(readlink "$p/exe")" = /usr/bin/pve-sandbox-agent ] || continue
        grep -zqx run "$p/cmdline" || continue
        echo "$1 ${p#/proc/} $(sed -n "s/^VmRSS:[^0-9]*\([0-9]*\) kB/\1/p" "$p/status")"
      done' sh "$node"
  done
}

before=$(agents)
echo "at the start: $(tr '\n' ';' <<<"$before")"
deadline=$((SECONDS + minutes * 60))
rounds=0
while [ "$SECONDS" -lt "$deadline" ]; do
  cargo nextest run --release --locked --workspace --test lxc -E "not ($ending)"
  rounds=$((rounds + 1))
  echo "after round $rounds, $((SECONDS / 60)) min: $(agents | tr '\n' ';')"
done

lived=0
while read -r node pid kib; do
  grep -q "^$node $pid " <<<"$before" || continue
  lived=$((lived + 1))
  [ "$kib" -le "$max_kib" ] || { echo "the agent of $node uses $kib KiB, more than $max_kib" >&2; exit 1; }
done <<<"$(agents)"
[ "$lived" -gt 0 ] || { echo "no agent lived through all of it: nothing was measured" >&2; exit 1; }
echo "$lived agents lived through $rounds rounds and use at most $max_kib KiB each"
