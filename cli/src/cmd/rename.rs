//! `rename`: gives a sandbox another name, or none.

use clap::Args;
use proto::{sandbox::v1::Sandbox, update};

use super::targets::One;
use crate::{
    client::{Controller, patient, promised},
    failure::Failure,
    output::{Output, json},
};

/// Arguments of `rename`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl rename @last web  from now on `sandboxctl get web` shows it
  sandboxctl rename web ''     it has no name any more

A name is unique among the living sandboxes of your team: letters in lower case,
digits and dashes, at most 30, with a letter first.")]
pub(crate) struct Rename {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// New name; an empty one removes it
    name: String,
}

pub(super) async fn run(
    controller: Controller,
    Rename { sandbox: One { id }, name }: Rename,
    output: Output,
) -> Result<u8, Failure> {
    let request = update::request(Sandbox { id, name, ..Sandbox::default() }, &["name"]);
    let call = || {
        let (mut client, request) = (controller.sandboxes.clone(), request.clone());
        async move { client.update_sandbox(request).await }
    };
    let sandbox = promised(patient(call).await?.sandbox)?;
    if output.json {
        output.value(&json::sandbox(&sandbox))?;
    } else if sandbox.name.is_empty() {
        output.line(format!("{} has no name", sandbox.id))?;
    } else {
        output.line(format!("{} is {}", sandbox.id, sandbox.name))?;
    }
    Ok(0)
}
