//! `create`: requests sandboxes and waits until they answer.

use std::time::Duration;

use proto::sandbox::v1::{CreateSandboxRequest, Phase, Sandbox};
use tokio::time::Instant;

use super::{lifecycle::settled, wanted};
use crate::{
    args::Create,
    client::{Controller, answer, promised},
    failure::Failure,
    output::{Output, json},
    progress::Spinner,
};

/// Longest wait inside one call of the API, so that no call is silent for longer.
const SILENT: Duration = Duration::from_secs(20);
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(10);

pub(super) async fn run(
    controller: Controller,
    create: Create,
    output: Output,
) -> Result<u8, Failure> {
    let key = match create.request_id {
        Some(key) => key,
        None => random_key()?,
    };
    let request = wanted::request(&controller, create.wanted, key.clone()).await?;
    let count = create.count;
    let requests = (1..=count).map(|number| CreateSandboxRequest {
        request_id: if count == 1 { key.clone() } else { format!("{key}-{number}") },
        ..request.clone()
    });
    let (wait, no_wait) = (create.wait, create.no_wait);
    super::lifecycle::each(requests.collect(), output, show, move |request| {
        let controller = controller.clone();
        async move { one(&controller, request, wait, no_wait, count == 1, output).await }
    })
    .await
}

/// Prints the id on stdout, for scripts, and the rest on stderr, for people.
fn show(sandbox: &Sandbox, output: Output) -> Result<(), Failure> {
    output.line(&sandbox.id)?;
    let phase = json::phase(sandbox.phase());
    let place = [(" on ", &sandbox.node), (" at ", &sandbox.ip)].map(|(word, value)| {
        if value.is_empty() { String::new() } else { format!("{word}{value}") }
    });
    output.note(format!("{phase}{}", place.concat()));
    for service in &sandbox.services {
        output.note(format!("{}: {}", service.name, service.url));
    }
    Ok(())
}

async fn one(
    controller: &Controller,
    mut request: CreateSandboxRequest,
    wait: Duration,
    no_wait: bool,
    alone: bool,
    output: Output,
) -> Result<Sandbox, Failure> {
    let since = Instant::now();
    let deadline = since + wait;
    let spinner = Spinner::new(output.json || !alone || no_wait, "asking the controller");
    // With a person watching, showing the steps is worth an additional call.
    let silent = if no_wait || spinner.shown() { Duration::ZERO } else { SILENT.min(wait) };
    request.wait = prost_types::Duration::try_from(silent).ok();
    let sandbox = ask(controller, &request, deadline).await?;
    if no_wait || settled(&sandbox, Phase::Running)? {
        return Ok(sandbox);
    }
    // Without a terminal each step is a line, so that logs show what was waited for.
    let mut told = String::new();
    controller
        .follow_since(&sandbox.id, since, wait, |sandbox| {
            let now = progress(sandbox);
            if spinner.shown() {
                spinner.say(now);
            } else if alone && now != told && sandbox.phase() == Phase::Creating {
                output.note(&now);
                told = now;
            }
            settled(sandbox, Phase::Running)
        })
        .await
}

fn progress(sandbox: &Sandbox) -> String {
    let node =
        if sandbox.node.is_empty() { String::new() } else { format!(" on {}", sandbox.node) };
    format!("{}{node}: {}", sandbox.id, sandbox.progress().name())
}

/// Repeats the call until there is an answer: a request_id is never executed twice.
async fn ask(
    controller: &Controller,
    request: &CreateSandboxRequest,
    deadline: Instant,
) -> Result<Sandbox, Failure> {
    let mut heard = false;
    loop {
        let call = answer(controller.sandboxes.clone().create_sandbox(request.clone())).await;
        match call {
            Ok(response) => return promised(response.sandbox),
            // The call may have arrived: ask again. If it cannot have arrived, fail at once.
            Err(failure) if failure.transient && (heard || !failure.unreached) => {
                heard = true;
                let pause = failure.retry_after.unwrap_or(AGAIN).min(AGAIN_MAX);
                if Instant::now() + pause >= deadline {
                    let key = &request.request_id;
                    return Err(failure.hint(format!(
                        "it may still be created: ask again with --request-id {key}, it is not done twice"
                    )));
                }
                tokio::time::sleep(pause).await;
            }
            Err(failure) => return Err(failure),
        }
    }
}

pub(super) fn random_key() -> Result<String, Failure> {
    let mut bytes = [0_u8; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| Failure::local(format!("no random numbers: {error}")))?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid().to_string())
}
