//! `explain`: shows why a sandbox is on its node, node by node.

use clap::Args;
use proto::sandbox::v1::{
    ExplainPlacementRequest, Filtered, NodeVerdict, PlacementDecision,
    explain_placement_request::Subject,
};

use super::wanted::{self, Wanted};
use crate::{
    client::{Controller, promised, read},
    failure::Failure,
    listing::Listing,
    output::{
        Output, json,
        layout::{Column, Fit},
        table::{self, Cell, Colour, Table},
        time,
    },
};

/// Arguments of `explain`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl explain ID
  sandboxctl explain --dry-run --cpus 8")]
pub(crate) struct Explain {
    /// Sandbox whose recorded decision to show: its name, its id or a part of it from either end, a vmid,
    /// @current or @last
    #[arg(required_unless_present = "dry_run", conflicts_with = "dry_run")]
    pub(super) id: Option<String>,
    /// Decide now for a sandbox like this, and create nothing
    #[arg(long)]
    dry_run: bool,
    /// Description of the sandbox that would be created.
    #[command(flatten)]
    wanted: Wanted,
    /// Flags of the list.
    #[command(flatten)]
    listing: Listing,
}

const COLUMNS: &[Column] = &[
    Column::new("NODE").fit(Fit::Cut(12)),
    Column::new("VERDICT"),
    Column::new("SCORE").right(),
    Column::new("BECAUSE").fit(Fit::Fold(24)),
];

pub(super) async fn run(
    controller: Controller,
    explain: Explain,
    output: Output,
) -> Result<u8, Failure> {
    let subject = match &explain.id {
        Some(_) if explain.wanted != Wanted::default() => {
            return Err(Failure::usage(
                "flags that describe a sandbox do not change a recorded decision",
                "use them with --dry-run and no ID, or leave them out",
            ));
        }
        Some(id) => Subject::Id(id.clone()),
        None => {
            let request = wanted::request(&controller, explain.wanted, "dry-run".into()).await?;
            Subject::DryRun(request)
        }
    };
    let request = ExplainPlacementRequest { subject: Some(subject) };
    let call = || {
        let (mut client, request) = (controller.sandboxes.clone(), request.clone());
        async move { client.explain_placement(request).await }
    };
    let response = read(call).await?;
    let decision = promised(response.decision)?;
    if output.json {
        output.value(&json::decision(explain.id.as_deref(), &decision))?;
    } else {
        if !output.names {
            output.sentence(summary(explain.id.as_deref(), &decision))?;
        }
        // The JSON is one object, and was printed above.
        explain.listing.print::<()>(output, table(&decision), &[], "no node holds the snapshot")?;
    }
    Ok(0)
}

fn table(decision: &PlacementDecision) -> Table {
    let mut table = Table::new(COLUMNS);
    decision.nodes.iter().for_each(|verdict| table.row(row(verdict, &decision.node)));
    table
}

fn summary(id: Option<&str>, decision: &PlacementDecision) -> String {
    let node = match decision.node.as_str() {
        "" => "no node".to_owned(),
        node => node.to_owned(),
    };
    match id {
        None => format!("it would go to {node} now (the lowest score wins)"),
        Some(id) => {
            let when = time::rfc3339(decision.decided_at).unwrap_or_else(|| "-".into());
            let attempt = decision.attempt;
            format!("{id} went to {node} at {when}, attempt {attempt} (the lowest score wins)")
        }
    }
}

fn row(verdict: &NodeVerdict, chosen: &str) -> Vec<Cell> {
    if verdict.filtered() != Filtered::Unspecified {
        return vec![
            table::cell(&verdict.node),
            table::cell("out").colour(Colour::Red),
            table::cell(""),
            table::cell(format!("{}: {}", verdict.filtered().name(), verdict.detail)),
        ];
    }
    let chosen = verdict.node == chosen;
    vec![
        table::cell(&verdict.node),
        if chosen { table::cell("chosen").colour(Colour::Green) } else { table::cell("fits") },
        table::cell(format!("{:.3}", verdict.score)).number(verdict.score),
        table::cell(parts(verdict)),
    ]
}

/// Parts of the score, the weightiest first, and what else there is to say.
fn parts(verdict: &NodeVerdict) -> String {
    let mut parts: Vec<_> = verdict.parts.iter().collect();
    parts.sort_by(|a, b| b.value.abs().total_cmp(&a.value.abs()));
    let parts: Vec<_> = parts
        .iter()
        .map(|part| format!("{} {:.3}", part.kind().name().to_lowercase(), part.value))
        .collect();
    let mut words = vec![parts.join(" + "), verdict.detail.clone()];
    words.retain(|text| !text.is_empty());
    words.join("; ")
}

#[cfg(test)]
pub(super) mod tests {
    use proto::sandbox::v1::{ScorePart, ScorePartKind};

    use super::{super::parse, *};

    /// Table of verdicts with long values, for the screens.
    pub(in crate::cmd) fn screen() -> Table {
        let part = |(kind, value): (ScorePartKind, f64)| ScorePart { kind: kind.into(), value };
        let parts = [
            (ScorePartKind::Cpu, 0.125),
            (ScorePartKind::Memory, 0.25),
            (ScorePartKind::Latency, 0.031),
            (ScorePartKind::Starting, 0.5),
            (ScorePartKind::Spread, 0.008),
            (ScorePartKind::Pressure, 0.004),
            (ScorePartKind::Labels, 0.0),
        ];
        let fits = |node: &str, score: f64| NodeVerdict {
            node: node.into(),
            score,
            parts: parts.map(part).into(),
            ..NodeVerdict::default()
        };
        table(&PlacementDecision {
            node: "pve-frankfurt-rack-12".into(),
            nodes: vec![
                fits("pve-frankfurt-rack-12", 0.918),
                fits("pve2", 1.204),
                NodeVerdict {
                    node: "pve3".into(),
                    filtered: Filtered::MemorySum.into(),
                    detail: "6144 MiB are wanted and 512 MiB are left of 65536 MiB, of which \
                             117 sandboxes were given 65024 MiB"
                        .into(),
                    ..NodeVerdict::default()
                },
            ],
            ..PlacementDecision::default()
        })
    }

    #[test]
    fn explain_needs_a_sandbox_or_dry_run() {
        for right in ["100001", "--dry-run --snapshot s --cpus 2"] {
            assert!(parse::<Explain>(right).is_ok(), "{right}");
        }
        for wrong in ["", "100001 --dry-run"] {
            assert!(parse::<Explain>(wrong).is_err(), "{wrong}");
        }
    }
}
