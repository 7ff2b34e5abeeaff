//! `watch`: prints a line for every change of a sandbox, until it has ended.

use clap::Args;
use proto::sandbox::v1::{Phase, Sandbox};

use super::targets::One;
use crate::{
    client::Controller,
    failure::Failure,
    output::{Output, json, time},
    printable::one_line,
};

/// Arguments of `watch`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl watch ID         a line for each change, until it is gone
  sandboxctl watch ID --json  an object on each line")]
pub(crate) struct Watch {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
}

pub(super) async fn run(
    controller: Controller,
    Watch { sandbox: One { id } }: Watch,
    output: Output,
) -> Result<u8, Failure> {
    let mut last = None;
    controller
        .follow(&id, None, |sandbox| {
            // A reopened watch repeats the last known state.
            if last != Some((sandbox.revision, sandbox.phase, sandbox.progress())) {
                last = Some((sandbox.revision, sandbox.phase, sandbox.progress()));
                show(sandbox, output)?;
            }
            Ok(matches!(sandbox.phase(), Phase::Deleted | Phase::Failed))
        })
        .await?;
    Ok(0)
}

fn show(sandbox: &Sandbox, output: Output) -> Result<(), Failure> {
    if output.json {
        return output.value(&json::sandbox(sandbox));
    }
    let mut words = vec![time::now(), sandbox.id.clone(), json::phase(sandbox.phase()).into()];
    words.extend(
        [sandbox.progress().name(), sandbox.node.as_str(), sandbox.ip.as_str()]
            .into_iter()
            .filter(|word| !word.is_empty())
            .map(str::to_owned),
    );
    if let Some(failure) = &sandbox.failure {
        words.push(format!("{} ({})", failure.message, failure.reason()));
    }
    output.line(one_line(&words.join(" ")))
}
