//! `explain`: shows why a sandbox is on its node, node by node.

use comfy_table::{Cell, Color};
use proto::sandbox::v1::{
    ExplainPlacementRequest, NodeVerdict, PlacementDecision, explain_placement_request::Subject,
};

use super::wanted;
use crate::{
    args::{Explain, Wanted},
    client::{Controller, answer, promised},
    failure::Failure,
    output::{Output, json, table, time},
};

pub(super) async fn run(
    controller: Controller,
    explain: Explain,
    output: Output,
) -> Result<u8, Failure> {
    let subject = match &explain.id {
        Some(_) if explain.wanted != Wanted::default() => {
            return Err(Failure::usage(
                "a recorded decision is shown as it was made",
                "describe a sandbox with --dry-run, or leave those flags out",
            ));
        }
        Some(id) => Subject::Id(id.clone()),
        None => {
            let request = wanted::request(&controller, explain.wanted, "dry-run".into()).await?;
            Subject::DryRun(request)
        }
    };
    let request = ExplainPlacementRequest { subject: Some(subject) };
    let response = answer(controller.sandboxes.clone().explain_placement(request)).await?;
    let decision = promised(response.decision)?;
    if output.json {
        output.value(&json::decision(explain.id.as_deref(), &decision))?;
    } else {
        output.line(summary(explain.id.as_deref(), &decision))?;
        let mut rows = table::new(output, &["NODE", "VERDICT", "SCORE", "MADE OF", "BECAUSE"]);
        for verdict in &decision.nodes {
            rows.add_row(row(verdict, &decision.node, output));
        }
        output.styled(table::text(&rows))?;
    }
    Ok(0)
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

fn row(verdict: &NodeVerdict, chosen: &str, output: Output) -> Vec<Cell> {
    if !verdict.filtered.is_empty() {
        return vec![
            table::cell(&verdict.node),
            table::coloured(output, "out", Color::Red),
            table::cell(""),
            table::cell(""),
            table::cell(format!("{}: {}", verdict.filtered, verdict.detail)),
        ];
    }
    let parts: Vec<_> =
        verdict.parts.iter().map(|part| format!("{} {:.3}", part.name, part.value)).collect();
    let chosen = verdict.node == chosen;
    vec![
        table::cell(&verdict.node),
        if chosen { table::coloured(output, "chosen", Color::Green) } else { table::cell("fits") },
        table::number(format!("{:.3}", verdict.score)),
        table::cell(parts.join(" + ")),
        table::cell(&verdict.detail),
    ]
}
