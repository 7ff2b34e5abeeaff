//! `ps`: lists the running and the most recent commands of a sandbox.

use clap::Args;
use proto::sandbox::v1::ExecInfo;
use serde_json::{Value, json};

use super::{exec_id, targets::One};
use crate::{
    client::Controller,
    failure::Failure,
    listing::Listing,
    output::{
        Output,
        layout::{Column, Fit},
        short::Part,
        table::{self, Table},
        time,
    },
};

/// Arguments of `ps`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl ps ID                  the exec ids are for `logs` and `kill`
  sandboxctl ps ID -o wide          whole exec ids and command lines
  sandboxctl ps ID --sort -started  the latest last")]
pub(crate) struct Ps {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// Flags of the list.
    #[command(flatten)]
    listing: Listing,
}

const COLUMNS: &[Column] = &[
    Column::new("EXEC ID").fit(Fit::Cut(16)).ids(Part::Beginning),
    Column::new("STATE"),
    Column::new("EXIT").rank(1).right(),
    Column::new("STARTED").rank(2).right(),
    Column::new("STDOUT").rank(4).right(),
    Column::new("STDERR").rank(5).right(),
    Column::new("COMMAND").fit(Fit::Cut(20)),
];

pub(super) async fn run(
    controller: Controller,
    Ps { sandbox: One { id }, listing }: Ps,
    output: Output,
) -> Result<u8, Failure> {
    let execs = exec_id::list(&controller, &id).await?;
    let values: Vec<_> = execs.iter().map(value).collect();
    listing.print(output, table(&execs), &values, "no commands; `sandboxctl exec` runs one")?;
    Ok(0)
}

fn table(execs: &[ExecInfo]) -> Table {
    let mut table = Table::new(COLUMNS);
    for exec in execs {
        let code = exec.exit.map(|exit| exit.code);
        table.row(vec![
            table::cell(&exec.exec_id),
            table::cell(state(exec)),
            match code {
                Some(code) => table::cell(code.to_string()).number(code.into()),
                None => table::cell(""),
            },
            table::age(exec.started_at),
            table::number(exec.stdout_bytes),
            table::number(exec.stderr_bytes),
            table::cell(&exec.command),
        ]);
    }
    table
}

fn state(exec: &ExecInfo) -> &'static str {
    match exec.exit {
        _ if !exec.lost.is_empty() => "lost",
        Some(exit) if exit.timed_out => "timed out",
        Some(exit) if exit.signal != 0 => "killed",
        Some(_) => "ended",
        None if exec.attached > 0 => "attached",
        None => "running",
    }
}

/// JSON of a command.
pub(super) fn value(exec: &ExecInfo) -> Value {
    json!({
        "id": exec.exec_id,
        "command": exec.command,
        "state": state(exec),
        "code": exec.exit.map(|exit| exit.code),
        "signal": exec.exit.map(|exit| exit.signal),
        "timed_out": exec.exit.map(|exit| exit.timed_out),
        "lost": (!exec.lost.is_empty()).then_some(&exec.lost),
        "started_at": time::rfc3339(exec.started_at),
        "stdout_bytes": exec.stdout_bytes,
        "stderr_bytes": exec.stderr_bytes,
        "attached": exec.attached,
        "tty": exec.tty,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use proto::sandbox::v1::ExecExit;

    use super::*;

    /// Table of commands with long values, for the screens.
    pub(in crate::cmd) fn screen() -> Table {
        let exec = |exec_id: &str, exit: Option<ExecExit>| ExecInfo {
            exec_id: exec_id.into(),
            command: "cargo nextest run --workspace --all-targets --locked -- --nocapture a b c"
                .into(),
            exit,
            stdout_bytes: 123_456_789,
            stderr_bytes: 1024,
            ..ExecInfo::default()
        };
        let killed = ExecExit { code: 137, signal: 9, timed_out: true };
        table(&[
            exec("0b7d5ad4-2f5c-4b0e-9a51-5f0c3c1d2e3f", Some(killed)),
            exec("0b7d5ad4-3f5c-4b0e-9a51-5f0c3c1d2e3f", Some(ExecExit::default())),
            exec("nightly-build-of-the-main-branch-0117", None),
        ])
    }
}
