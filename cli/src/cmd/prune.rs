//! `prune`: deletes sandboxes that have been stopped for long.

use std::time::Duration;

use clap::Args;
use proto::sandbox::v1::PruneSandboxesRequest;
use serde_json::json;
use tokio::time::timeout;

use crate::{
    client::Controller,
    exit,
    failure::Failure,
    listing,
    output::{
        Output, json,
        layout::{Column, Fit},
        short::Part,
        table::{self, Table},
    },
    progress::Spinner,
    values::age,
};

/// Arguments of `prune`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl admin prune --older-than 14d --dry-run
                                           which have been stopped for two weeks
  sandboxctl admin prune --older-than 14d  delete them, for good")]
pub(crate) struct Prune {
    /// Stopped for so long at least, such as 12h or 14d; one hour is the least
    #[arg(long, value_name = "TIME", value_parser = age)]
    older_than: Duration,
    /// Those that have been paused for so long, too
    #[arg(long)]
    paused: bool,
    /// Show what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
}

/// Deadline of the call: it may delete many sandboxes.
const WAIT: Duration = Duration::from_secs(300);

const COLUMNS: &[Column] = &[
    Column::new("ID").ids(Part::End),
    Column::new("NODE").rank(1).fit(Fit::Cut(8)),
    Column::new("PHASE"),
    Column::new("FOR").right(),
    Column::new("OUTCOME").fit(Fit::Fold(24)),
];

pub(super) async fn run(
    controller: Controller,
    args: Prune,
    output: Output,
) -> Result<u8, Failure> {
    let request = PruneSandboxesRequest {
        older_than: prost_types::Duration::try_from(args.older_than).ok(),
        paused: args.paused,
        dry_run: args.dry_run,
    };
    let spinner = Spinner::new(output.json, "looking for what has been stopped for long");
    let mut sandboxes = controller.sandboxes.clone();
    let pruned = timeout(WAIT, sandboxes.prune_sandboxes(request))
        .await
        .map_err(|_| Failure::deadline("the deletions did not end", WAIT))??
        .into_inner()
        .sandboxes;
    drop(spinner);
    let failed = pruned.iter().any(|one| !one.error.is_empty());
    if output.json {
        let one = |one: &proto::sandbox::v1::PrunedSandbox| {
            json!({
                "sandbox": one.sandbox.as_ref().map(json::sandbox),
                "deleted": one.deleted,
                "error": one.error,
            })
        };
        output.value(&pruned.iter().map(one).collect::<Vec<_>>())?;
    } else {
        let mut rows = Table::new(COLUMNS);
        for one in &pruned {
            let Some(sandbox) = &one.sandbox else { continue };
            let outcome = match (one.deleted, one.error.as_str()) {
                (true, _) => "deleted",
                (false, "") => "would be deleted",
                (false, why) => why,
            };
            rows.row(vec![
                table::cell(&sandbox.id),
                table::cell(&sandbox.node),
                table::phase(sandbox.phase(), ""),
                table::age(sandbox.since),
                table::cell(outcome),
            ]);
        }
        if pruned.is_empty() {
            output.line("nothing has been stopped for so long")?;
        } else {
            listing::table(output, rows)?;
        }
    }
    Ok(if failed { exit::REFUSED } else { 0 })
}
