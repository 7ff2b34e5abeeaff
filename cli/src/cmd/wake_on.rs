//! `wake-on`: sets the events that wake a paused sandbox.

use clap::Args;
use proto::{sandbox::v1 as wire, update};

use super::targets::One;
use crate::{
    client::{Controller, fetch, patient, promised},
    failure::Failure,
    output::{Output, json},
};

/// Arguments of `wake-on`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl wake-on ID                      show what wakes it
  sandboxctl wake-on ID --http off           requests get 503 while it is paused
  sandboxctl wake-on ID --http on --exec on  as a new sandbox has it

What is not named stays as it is.")]
pub(crate) struct WakeOn {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// A request for one of its open ports
    #[arg(long, value_name = "on|off", value_parser = switch)]
    http: Option<bool>,
    /// A command, or access to its files
    #[arg(long, value_name = "on|off", value_parser = switch)]
    exec: Option<bool>,
    /// A login, file transfer or forward by SSH
    #[arg(long, value_name = "on|off", value_parser = switch)]
    ssh: Option<bool>,
}

/// `on` or `off`.
pub(super) fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("must be on or off".into()),
    }
}

pub(super) async fn run(
    controller: Controller,
    args: WakeOn,
    output: Output,
) -> Result<u8, Failure> {
    let mut sandbox = fetch(&controller, args.sandbox.id).await?;
    if args.http.is_some() || args.exec.is_some() || args.ssh.is_some() {
        let wake_on = wire::WakeOn {
            http: args.http.unwrap_or_default(),
            exec: args.exec.unwrap_or_default(),
            ssh: args.ssh.unwrap_or_default(),
        };
        let fields =
            [("wake_on.http", args.http), ("wake_on.exec", args.exec), ("wake_on.ssh", args.ssh)];
        let fields = fields.iter().filter(|(_, on)| on.is_some()).map(|(field, _)| *field);
        let change = wire::Sandbox { id: sandbox.id, wake_on: Some(wake_on), ..Default::default() };
        let request = update::request(change, &fields.collect::<Vec<_>>());
        let call = || {
            let (mut client, request) = (controller.sandboxes.clone(), request.clone());
            async move { client.update_sandbox(request).await }
        };
        sandbox = promised(patient(call).await?.sandbox)?;
    }
    if output.json {
        output.value(&json::sandbox(&sandbox))?;
    } else {
        output.line(format!("{} {}", sandbox.id, words(sandbox.wake_on)))?;
    }
    Ok(0)
}

/// Text such as `http, exec`, or `nothing`.
pub(super) fn words(wake_on: Option<wire::WakeOn>) -> String {
    let on = wake_on.unwrap_or_default();
    let names = [("http", on.http), ("exec", on.exec), ("ssh", on.ssh)];
    let names: Vec<_> = names.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    if names.is_empty() { "nothing".into() } else { names.join(", ") }
}
