//! `logs`: prints a command's output up to now, and with -f also what follows.

use proto::{Reason, sandbox::v1::ListExecsRequest};
use tokio::sync::mpsc;

use super::exec::code;
use crate::{
    args::Logs,
    client::{Controller, answer},
    failure::Failure,
    output::Output,
    session::{Ended, Session, Sink},
};

pub(super) async fn run(controller: Controller, logs: Logs, output: Output) -> Result<u8, Failure> {
    let until = match logs.follow {
        true => None,
        // Stops at the output's present length.
        false => {
            let request = ListExecsRequest { id: logs.id.clone() };
            let execs = answer(controller.sandboxes.clone().list_execs(request)).await?.execs;
            let exec = execs.into_iter().find(|exec| exec.exec_id == logs.exec_id);
            let exec = exec.ok_or_else(|| {
                let what = format!("there is no command {} in the sandbox", logs.exec_id);
                Failure::of_reason(Reason::ExecNotFound, what)
            })?;
            Some([exec.stdout_bytes, exec.stderr_bytes])
        }
    };
    // Our half stays open: its end could be taken for the end of the command's stdin.
    let (_sender, input) = mpsc::channel(1);
    let mut sink = Sink::new(false)?;
    let mut session = Session::attach(controller, logs.id, logs.exec_id, until);
    match session.run(input, &mut sink, output).await? {
        Ended::Exit(exit) if logs.follow => Ok(code(exit, output)),
        Ended::Exit(_) | Ended::Seen => Ok(0),
    }
}
