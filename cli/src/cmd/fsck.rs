//! `fsck`: checks the invariants of the whole system.

use std::time::Duration;

use proto::sandbox::v1::FsckRequest;
use tokio::time::timeout;

use crate::{
    client::Controller,
    exit,
    failure::Failure,
    listing,
    output::{
        Output, json,
        layout::{Column, Fit},
        table::{self, Table},
    },
    progress::Spinner,
};

/// Deadline of the call: it checks every node, which may take longer than other calls.
const WAIT: Duration = Duration::from_secs(120);

const COLUMNS: &[Column] = &[
    Column::new("INVARIANT"),
    Column::new("NODE").fit(Fit::Cut(8)),
    Column::new("SUBJECT").fit(Fit::Fold(16)),
    Column::new("FINDING").fit(Fit::Fold(24)),
];

pub(super) async fn run(controller: Controller, output: Output) -> Result<u8, Failure> {
    let spinner = Spinner::new(output.json, "checking the controller and every node");
    let mut operator = controller.operator.clone();
    let response = timeout(WAIT, operator.fsck(FsckRequest {}))
        .await
        .map_err(|_| Failure::deadline("the check did not end", WAIT))??
        .into_inner();
    drop(spinner);
    let clean = response.findings.is_empty();
    if output.json {
        output.value(&json::fsck(&response))?;
    } else {
        if !clean {
            let mut rows = Table::new(COLUMNS);
            for finding in &response.findings {
                let invariant = finding.invariant().name();
                let cells = [invariant, &finding.node, &finding.subject, &finding.detail];
                rows.row(cells.map(table::cell).into());
            }
            listing::table(output, rows)?;
        }
        let verdict = match response.findings.len() {
            0 => "nothing is wrong".to_owned(),
            1 => "1 finding".to_owned(),
            several => format!("{several} findings"),
        };
        let (sandboxes, nodes) = (response.sandboxes, response.nodes);
        output.line(format!("checked {sandboxes} sandboxes on {nodes} nodes: {verdict}"))?;
    }
    Ok(if clean { 0 } else { exit::REFUSED })
}
