//! `node`: the verbs of operators for a node, and of them `node forget`.

use clap::Subcommand;
use proto::sandbox::v1::ForgetNodeRequest;
use serde_json::json;

use super::{cordon, drain, node_revoke, node_token, nodes, on_node, uncordon};
use crate::{
    client::{Controller, answer},
    failure::Failure,
    listing,
    output::{Output, json},
};

/// Verbs of `node`.
#[derive(Debug, Subcommand)]
pub(crate) enum Node {
    /// List the nodes and their load
    #[command(visible_alias = "list")]
    Ls(nodes::Nodes),
    /// Make a one-time token, and print the line that joins a node
    Token(node_token::NodeToken),
    /// Turn a node away at once: its certificates are refused
    Revoke(node_revoke::NodeRevoke),
    /// Give a node no new sandboxes
    Cordon(cordon::Cordon),
    /// Give a node new sandboxes again
    Uncordon(uncordon::Uncordon),
    /// Cordon a node and empty it, and show what is still there
    Drain(drain::Drain),
    /// Give up a node that will not come back, and the sandboxes that were on it
    #[command(after_help = "\
Examples:
  sandboxctl node forget pve3 --dry-run  which sandboxes go with it
  sandboxctl node forget pve3 --lost     they are DELETED, with the cause
                                         node_lost

A node that answers is not forgotten. Should it come back after all, it and its
sandboxes are found again. Take it out of the cluster with `pvecm delnode`
first, and out of the controller's configuration if it stands there.")]
    Forget {
        /// PVE's name of it
        node: String,
        /// Give up its sandboxes: they become DELETED
        #[arg(long)]
        lost: bool,
        /// Show what would be done, and do nothing
        #[arg(long)]
        dry_run: bool,
    },
}

pub(super) async fn run(controller: Controller, verb: Node, output: Output) -> Result<u8, Failure> {
    match verb {
        Node::Ls(args) => nodes::run(controller, args, output).await,
        Node::Token(args) => node_token::run(controller, args, output).await,
        Node::Revoke(args) => node_revoke::run(controller, args, output).await,
        Node::Cordon(args) => cordon::run(controller, args, output).await,
        Node::Uncordon(args) => uncordon::run(controller, args, output).await,
        Node::Drain(args) => drain::run(controller, args, output).await,
        Node::Forget { node, lost, dry_run } => {
            forget(controller, node, lost, dry_run, output).await
        }
    }
}

async fn forget(
    controller: Controller,
    node: String,
    lost: bool,
    dry_run: bool,
    output: Output,
) -> Result<u8, Failure> {
    let request = ForgetNodeRequest { node: node.clone(), lost, dry_run };
    let gone = answer(controller.operator.clone().forget_node(request)).await?.sandboxes;
    if output.json {
        let sandboxes: Vec<_> = gone.iter().map(json::sandbox).collect();
        output.value(&json!({ "sandboxes": sandboxes, "forgotten": !dry_run }))?;
        return Ok(0);
    }
    if !gone.is_empty() {
        listing::table(output, on_node::table(&gone))?;
    }
    let count = gone.len();
    output.line(if dry_run {
        format!("{node} would be forgotten, and {count} sandboxes with it; nothing was done")
    } else {
        format!("{node} is forgotten, and {count} sandboxes with it")
    })?;
    Ok(0)
}
