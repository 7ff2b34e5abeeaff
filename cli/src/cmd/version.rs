//! `version`: shows our version, and the controller's if it can be reached.

use proto::sandbox::v1::GetVersionRequest;
use serde_json::json;

use crate::{
    client::{Controller, answer},
    failure::Failure,
    output::Output,
};

const OWN: &str = env!("CARGO_PKG_VERSION");

pub(super) async fn run(
    controller: Result<Controller, Failure>,
    output: Output,
) -> Result<u8, Failure> {
    if !output.json {
        output.line(format!("sandboxctl {OWN}"))?;
    }
    let asked = match controller {
        Ok(controller) => {
            answer(controller.operator.clone().get_version(GetVersionRequest {})).await
        }
        Err(failure) => Err(failure),
    };
    // Our own version was printed first, so an unreachable controller is no failure.
    match (&asked, output.json) {
        (Ok(theirs), false) => {
            output.line(format!("controller {} (epoch {})", theirs.version, theirs.epoch))?;
        }
        (Err(failure), false) => output.note(format!("controller: {}", failure.message)),
        (Ok(theirs), true) => output.value(&json!({
            "version": OWN, "controller": { "version": theirs.version, "epoch": theirs.epoch },
        }))?,
        (Err(failure), true) => output.value(&json!({
            "version": OWN, "controller": null, "error": failure.message,
        }))?,
    }
    Ok(0)
}
