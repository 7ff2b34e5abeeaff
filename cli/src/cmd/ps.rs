//! `ps`: lists the running and the most recent commands of a sandbox.

use proto::sandbox::v1::{ExecInfo, ListExecsRequest};
use serde_json::{Value, json};

use crate::{
    client::{Controller, patient},
    failure::Failure,
    output::{Output, table, time},
};

pub(super) async fn run(controller: Controller, id: String, output: Output) -> Result<u8, Failure> {
    let call = || {
        let (mut client, request) =
            (controller.sandboxes.clone(), ListExecsRequest { id: id.clone() });
        async move { client.list_execs(request).await }
    };
    let execs = patient(call).await?.execs;
    if output.json {
        output.value(&execs.iter().map(value).collect::<Vec<_>>())?;
    } else if execs.is_empty() {
        output.note("no commands; `sandboxctl exec` runs one");
    } else {
        let headings = ["EXEC ID", "STATE", "EXIT", "STARTED", "STDOUT", "STDERR", "COMMAND"];
        let mut rows = table::new(output, &headings);
        for exec in &execs {
            rows.add_row(vec![
                table::cell(&exec.exec_id),
                table::cell(state(exec)),
                table::cell(exec.exit.map(|exit| exit.code.to_string()).unwrap_or_default()),
                table::cell(time::age(exec.started_at)),
                table::number(exec.stdout_bytes),
                table::number(exec.stderr_bytes),
                table::cell(&exec.command),
            ]);
        }
        output.styled(table::text(&rows))?;
    }
    Ok(0)
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

fn value(exec: &ExecInfo) -> Value {
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
