//! `get`: shows all details of one sandbox.

use clap::Args;
use proto::Cause;
use proto::sandbox::v1::{Sandbox, Size};

use super::targets::One;
use crate::{
    client::{Controller, fetch},
    failure::Failure,
    output::{Output, json, table, time},
    printable::one_line,
};

/// Arguments of `get`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl get ID
  sandboxctl get --json ID | jq -r .ip          see `inspect` for everything")]
pub(crate) struct Get {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
}

pub(super) async fn run(
    controller: Controller,
    Get { sandbox: One { id } }: Get,
    output: Output,
) -> Result<u8, Failure> {
    let sandbox = fetch(&controller, id).await?;
    if output.json {
        output.value(&json::sandbox(&sandbox))?;
    } else {
        output.line(describe(&sandbox))?;
    }
    Ok(0)
}

/// Short form of a size.
pub(super) fn size(size: Option<Size>) -> String {
    let size = size.unwrap_or_default();
    let disk = match size.disk_gib {
        0 => String::new(),
        gib => format!(", disk {}", table::bytes(u64::from(gib) << 30)),
    };
    format!("{}{disk}", cores_and_memory(size))
}

/// Short form of a size without its disk.
pub(super) fn cores_and_memory(size: Size) -> String {
    format!("{} cpu, {}", size.cpu_cores, table::bytes(u64::from(size.memory_mib) << 20))
}

fn describe(sandbox: &Sandbox) -> String {
    let phase = json::phase(sandbox.phase());
    let step = match sandbox.progress().name() {
        "" => String::new(),
        step => format!(" ({step})"),
    };
    let when = |time| match time::rfc3339(time) {
        Some(text) => format!("{text} ({} ago)", time::age(time)),
        None => "-".into(),
    };
    let mut lines = vec![
        ("id", sandbox.id.clone()),
        ("name", sandbox.name.clone()),
        ("vmid", sandbox.vmid.to_string()),
        ("phase", format!("{phase}{step}")),
        ("node", sandbox.node.clone()),
        ("ip", sandbox.ip.clone()),
        ("snapshot", sandbox.snapshot_id.clone()),
        ("size", size(sandbox.size)),
        ("team", sandbox.team.clone()),
        ("created", when(sandbox.created_at)),
        ("started", when(sandbox.started_at)),
        ("boot", sandbox.boot.to_string()),
        ("attempt", sandbox.attempt.to_string()),
        ("request id", sandbox.request_id.clone()),
    ];
    lines.push(("egress", super::egress::words(sandbox)));
    lines.push(("wake on", super::wake_on::words(sandbox.wake_on)));
    lines.push(("lifetime", super::lifetime::words(sandbox)));
    if sandbox.cause() != Cause::ASKED {
        lines.push(("cause", sandbox.cause().name().to_lowercase()));
    }
    match json::stop_result(sandbox.stop_result()) {
        "" => {}
        how => lines.push(("stopped", how.replace('_', " "))),
    }
    for service in &sandbox.services {
        let who = service.visibility().word();
        lines.push(("port", format!("{} {who} {} {}", service.port, service.name, service.url)));
    }
    for (key, value) in &sandbox.metadata {
        lines.push(("metadata", format!("{key}={value}")));
    }
    if let Some(failure) = &sandbox.failure {
        lines.push(("failure", format!("{} ({})", failure.message, failure.reason())));
        if !failure.rollback.is_empty() {
            lines.push(("rollback", failure.rollback.clone()));
        }
    }
    let line = |(name, value): (&str, String)| {
        let value = if value.is_empty() { "-".to_owned() } else { one_line(&value) };
        format!("{:<12}{value}", format!("{name}:"))
    };
    lines.into_iter().map(line).collect::<Vec<_>>().join("\n")
}
