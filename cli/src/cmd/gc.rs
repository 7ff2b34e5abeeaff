//! `gc`: lets the nodes clean up now, or shows what they would do.

use std::time::Duration;

use clap::Args;
use proto::sandbox::v1::CollectGarbageRequest;
use serde_json::json;
use tokio::time::timeout;

use crate::{
    client::Controller,
    exit,
    failure::Failure,
    listing,
    output::{
        Output,
        layout::{Column, Fit},
        table::{self, Table},
    },
    progress::Spinner,
};

/// Arguments of `gc`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl admin gc --dry-run    what the nodes would do, and why
  sandboxctl admin gc --node pve2  let one do it now, and not at its next round

Nodes clean up by themselves every ten seconds. What carries our mark and stands
in no journal is only told of; `recover` takes it back.")]
pub(crate) struct Gc {
    /// Show what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// One node [default: all]
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
}

/// Deadline of the call: it checks every node.
const WAIT: Duration = Duration::from_secs(300);

const COLUMNS: &[Column] = &[
    Column::new("NODE").fit(Fit::Cut(8)),
    Column::new("ACTION"),
    Column::new("SUBJECT").fit(Fit::Fold(16)),
    Column::new("BECAUSE").fit(Fit::Fold(24)),
];

pub(super) async fn run(controller: Controller, args: Gc, output: Output) -> Result<u8, Failure> {
    let request =
        CollectGarbageRequest { dry_run: args.dry_run, node: args.node.unwrap_or_default() };
    let spinner = Spinner::new(output.json, "asking the nodes");
    let mut operator = controller.operator.clone();
    let found = timeout(WAIT, operator.collect_garbage(request))
        .await
        .map_err(|_| Failure::deadline("the nodes did not answer", WAIT))??
        .into_inner();
    drop(spinner);
    if output.json {
        let item = |item: &proto::sandbox::v1::GarbageItem| {
            json!({
                "node": item.node, "action": item.action().name().to_lowercase(), "subject": item.subject, "why": item.why,
            })
        };
        let items: Vec<_> = found.items.iter().map(item).collect();
        output.value(&json!({ "items": items, "unreachable": found.unreachable }))?;
    } else {
        if !found.items.is_empty() {
            let mut rows = Table::new(COLUMNS);
            for item in &found.items {
                let action = item.action().name().to_lowercase();
                let cells = [&item.node, &action, &item.subject, &item.why];
                rows.row(cells.map(table::cell).into());
            }
            listing::table(output, rows)?;
        }
        output.line(match (found.items.len(), args.dry_run) {
            (0, _) => "there is nothing to clean up".to_owned(),
            (count, true) => format!("{count} found; nothing was done"),
            (count, false) => format!("{count} found; the nodes are cleaning up now"),
        })?;
    }
    for node in &found.unreachable {
        output.note(format!("{node} did not answer"));
    }
    Ok(if found.unreachable.is_empty() { 0 } else { exit::REFUSED })
}
