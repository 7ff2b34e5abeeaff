//! `egress`: sets what a sandbox reaches outside of itself.

use clap::Args;
use proto::{sandbox::v1 as wire, spec, update};

use super::targets::One;
use crate::{
    client::{Controller, fetch, patient, promised},
    failure::Failure,
    output::{Output, json},
};

/// Arguments of `egress`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl egress ID       show what it reaches
  sandboxctl egress ID none  nothing, not even a name server
  sandboxctl egress ID 'allow=github.com,*.npmjs.org'
                             these names, and those below npmjs.org
  sandboxctl egress ID open  public addresses, as far as your team may

Commands, files and web requests get into it in each case. Its open connections
to outside end, unless they are to an address that it may still reach. A list
takes the place of the one before. The agent of its node logs the names that it
asked for and did not get.")]
pub(crate) struct Egress {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    #[arg(value_name = "open|none|allow=NAMES", help = "What it reaches from now on")]
    egress: Option<spec::Egress>,
}

/// Returns the reach of a sandbox as it is typed; empty when its node does not say it.
pub(super) fn words(sandbox: &wire::Sandbox) -> String {
    let word = json::egress(sandbox.egress());
    match &sandbox.egress_names[..] {
        [] => word.to_owned(),
        names => format!("{word}={}", names.join(",")),
    }
}

pub(super) async fn run(
    controller: Controller,
    args: Egress,
    output: Output,
) -> Result<u8, Failure> {
    let mut sandbox = fetch(&controller, args.sandbox.id).await?;
    if let Some(egress) = args.egress {
        let change = wire::Sandbox {
            id: sandbox.id,
            egress: wire::Egress::from(&egress).into(),
            egress_names: egress.names(),
            ..Default::default()
        };
        let request = update::request(change, &["egress"]);
        let call = || {
            let (mut client, request) = (controller.sandboxes.clone(), request.clone());
            async move { client.update_sandbox(request).await }
        };
        sandbox = promised(patient(call).await?.sandbox)?;
    }
    if output.json {
        output.value(&json::sandbox(&sandbox))?;
    } else {
        output.line(format!("{} {}", sandbox.id, words(&sandbox)))?;
    }
    Ok(0)
}
