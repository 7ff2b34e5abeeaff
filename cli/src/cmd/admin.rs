//! `admin`: the verbs of operators for the whole system, under one word.

use clap::Subcommand;

use super::{adopt, compare, fsck, gc, prune, recover, release};
use crate::{client::Controller, failure::Failure, output::Output};

/// Verbs of `admin`.
#[derive(Debug, Subcommand)]
pub(crate) enum Admin {
    /// Check that nothing is lost, leaked or doubled; exit 1 if something is
    #[command(after_help = "\
Examples:
  sandboxctl admin fsck  every node and the controller; takes some seconds
  sandboxctl admin fsck --json | jq .findings")]
    Fsck,
    /// Let the nodes clean up now, or tell what they would do and why
    Gc(gc::Gc),
    /// Delete sandboxes that have been stopped for long
    Prune(prune::Prune),
    /// Compare a list of ids with what there is, both ways; exit 1 if they differ
    Compare(compare::Compare),
    /// Make a sandbox of a container that was made without us
    Adopt(adopt::Adopt),
    /// Take a container back that carries our mark and that its node does not know any more
    Recover(recover::Recover),
    /// End a sandbox and leave its container: an adopted one, or one whose container is not its own
    Release(release::Release),
}

pub(super) async fn run(
    controller: Controller,
    verb: Admin,
    output: Output,
) -> Result<u8, Failure> {
    match verb {
        Admin::Fsck => fsck::run(controller, output).await,
        Admin::Gc(args) => gc::run(controller, args, output).await,
        Admin::Prune(args) => prune::run(controller, args, output).await,
        Admin::Compare(args) => compare::run(controller, args, output).await,
        Admin::Adopt(args) => adopt::run(controller, args, output).await,
        Admin::Recover(args) => recover::run(controller, args, output).await,
        Admin::Release(args) => release::run(controller, args, output).await,
    }
}
