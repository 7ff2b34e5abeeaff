//! Answers of `sandboxctl` in JSON.

use serde_json::Value;

use super::{booted::Booted, steps::CLI};

/// Runs `sandboxctl` on a node; returns its answer.
#[track_caller]
pub(crate) fn json(node: &Booted, words: &[&str]) -> Value {
    let argv = [&[CLI][..], words, &["--json"]].concat();
    let output = node.command(&argv).output().expect("nsenter");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Returns the nodes that are ready.
#[track_caller]
pub(crate) fn ready_nodes(node: &Booted) -> Vec<Value> {
    let Value::Array(mut nodes) = json(node, &["node", "ls"]) else { panic!("no list of nodes") };
    nodes.retain(|node| node["ready"] == true);
    nodes
}
