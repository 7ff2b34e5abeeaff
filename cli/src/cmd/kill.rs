//! `kill`: signals a command and all its descendants.

use proto::sandbox::v1::SignalExecRequest;
use serde_json::json;

use crate::{
    args::Kill,
    client::{Controller, answer},
    failure::Failure,
    output::Output,
};

pub(super) async fn run(controller: Controller, kill: Kill, output: Output) -> Result<u8, Failure> {
    let request = SignalExecRequest {
        id: kill.id.clone(),
        exec_id: kill.exec_id.clone(),
        signal: kill.signal.0,
    };
    answer(controller.sandboxes.clone().signal_exec(request)).await?;
    if output.json {
        let (id, exec_id) = (&kill.id, &kill.exec_id);
        output.value(&json!({ "id": id, "exec_id": exec_id, "signal": kill.signal.0 }))?;
    }
    Ok(0)
}
