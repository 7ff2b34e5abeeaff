//! `wake-on`: sets the events that wake a paused sandbox.

use proto::sandbox::v1::{self as wire, SetWakeOnRequest};

use crate::{
    args::WakeOn,
    client::{Controller, fetch, patient, promised},
    failure::Failure,
    output::{Output, json},
};

pub(super) async fn run(
    controller: Controller,
    wish: WakeOn,
    output: Output,
) -> Result<u8, Failure> {
    let mut sandbox = fetch(&controller, wish.id).await?;
    if wish.http.is_some() || wish.exec.is_some() || wish.ssh.is_some() {
        let mut wake_on = sandbox.wake_on.unwrap_or_default();
        wake_on.http = wish.http.unwrap_or(wake_on.http);
        wake_on.exec = wish.exec.unwrap_or(wake_on.exec);
        wake_on.ssh = wish.ssh.unwrap_or(wake_on.ssh);
        let request = SetWakeOnRequest { id: sandbox.id, wake_on: Some(wake_on) };
        let call = || {
            let (mut client, request) = (controller.sandboxes.clone(), request.clone());
            async move { client.set_wake_on(request).await }
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
