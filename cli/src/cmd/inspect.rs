//! `inspect`: everything that is known of a sandbox, as JSON.

use std::time::Duration;

use clap::Args;
use proto::sandbox::v1::{
    ExplainPlacementRequest, GetUsageRequest, WatchEventsRequest,
    explain_placement_request::Subject,
};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::targets::Many;
use crate::{
    client::{Controller, answer, fetch},
    failure::Failure,
    output::{Output, json},
    printable,
};

/// Arguments of `inspect`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl inspect ID       indented; --json is the same on one line
  sandboxctl inspect ID | jq .placement.nodes
  sandboxctl inspect ID1 ID2  several are a list

As `get --json`, and with it: `placement` (as `explain`), `execs` (as `ps`),
`usage` and the last 20 `events`. What cannot be read now is null.")]
pub(crate) struct Inspect {
    /// Sandboxes.
    #[command(flatten)]
    pub(super) sandboxes: Many,
}

/// Events that are shown.
const EVENTS: u32 = 20;
/// Longest wait for the events.
const WAIT: Duration = Duration::from_secs(10);

pub(super) async fn run(
    controller: Controller,
    Inspect { sandboxes: Many { ids } }: Inspect,
    output: Output,
) -> Result<u8, Failure> {
    let mut all = Vec::new();
    for id in ids {
        all.push(one(&controller, id).await?);
    }
    let value = if all.len() == 1 { all.remove(0) } else { Value::Array(all) };
    if output.json {
        output.value(&value)?;
    } else {
        output.styled(printable::indented(&printable::json(&value)?))?;
    }
    Ok(0)
}

async fn one(controller: &Controller, id: String) -> Result<Value, Failure> {
    let sandbox = fetch(controller, id).await?;
    let id = sandbox.id.as_str();
    let mut value = json!(json::sandbox(&sandbox));
    value["placement"] = placement(controller, id).await.unwrap_or_default();
    value["execs"] = match super::exec_id::list(controller, id).await {
        Ok(execs) => execs.iter().map(super::ps::value).collect(),
        Err(_) => Value::Null,
    };
    value["usage"] = usage(controller, id).await.unwrap_or_default();
    value["events"] = match timeout(WAIT, events(controller, id)).await {
        Ok(Ok(events)) => Value::Array(events),
        _ => Value::Null,
    };
    Ok(value)
}

async fn placement(controller: &Controller, id: &str) -> Result<Value, Failure> {
    let request = ExplainPlacementRequest { subject: Some(Subject::Id(id.to_owned())) };
    let told = answer(controller.sandboxes.clone().explain_placement(request)).await?;
    Ok(told.decision.map_or(Value::Null, |decision| json!(json::decision(Some(id), &decision))))
}

async fn usage(controller: &Controller, id: &str) -> Result<Value, Failure> {
    let request = GetUsageRequest { ids: vec![id.to_owned()], ..Default::default() };
    let told = answer(controller.sandboxes.clone().get_usage(request)).await?;
    Ok(told.usages.first().map_or(Value::Null, super::top::totals))
}

async fn events(controller: &Controller, id: &str) -> Result<Vec<Value>, Failure> {
    let request = WatchEventsRequest {
        id: id.to_owned(),
        last: Some(EVENTS),
        ..WatchEventsRequest::default()
    };
    let mut stream = answer(controller.sandboxes.clone().watch_events(request)).await?;
    let mut events = Vec::new();
    // A message without an event: all up to now have come.
    while let Some(event) = stream.message().await?.and_then(|said| said.event) {
        events.push(json!(json::event(&event)));
    }
    Ok(events)
}
