//! `create`: requests sandboxes and waits until they answer.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use clap::Args;
use proto::sandbox::v1::{CreateSandboxRequest, Phase, Sandbox};
use tokio::time::Instant;

use super::{
    lifecycle::settled,
    url::note_bypass,
    wanted::{self, Wanted},
};
use crate::{
    client::{Controller, answer, promised},
    failure::Failure,
    output::{Output, json},
    progress::Spinner,
    signals::Stops,
    state::Slot,
    values::duration,
};

/// Arguments of `create`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl create --snapshot debian-trixie --cpus 2 --memory 2g --disk 20g
  sandboxctl create --expose web=8080 --env RUST_LOG=debug --meta user=ada
  sandboxctl create --count 6
  sandboxctl create --ttl 8h --ttl-action delete --idle 30m
  sandboxctl create --request-id build-117      run it twice: still one sandbox

With --count each is printed as it comes. After Ctrl-C a creation goes on, and
its id and request id are printed. See also `run`.")]
pub(crate) struct Create {
    /// Description of the sandbox.
    #[command(flatten)]
    wanted: Wanted,
    /// Idempotency key: the same key and arguments return the same sandbox [default: random]
    #[arg(long, value_name = "KEY")]
    request_id: Option<String>,
    /// Print the id as soon as the creation is recorded
    #[arg(long)]
    no_wait: bool,
    /// How many, at once; with --request-id the keys are KEY-1, KEY-2 and so on
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "name", value_parser = clap::value_parser!(u32).range(1..=1000))]
    count: u32,
    /// How long to wait for it to run before giving up watching
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    wait: Duration,
}

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
    let (count, no_wait) = (create.count, create.no_wait);
    let creation = |number| {
        let request_id = if count == 1 { key.clone() } else { format!("{key}-{number}") };
        let request = CreateSandboxRequest { request_id, ..request.clone() };
        Arc::new(Creation::new(&controller, request, create.wait))
    };
    let creations: Vec<_> = (1..=count).map(creation).collect();
    let mut stops = Stops::listen()?;
    let all =
        super::lifecycle::each(creations.clone(), output, show, true, move |creation| async move {
            let way = Way { quick: false, no_wait, alone: count == 1 };
            creation.finish(way, output).await
        });
    tokio::select! {
        ended = all => ended,
        stop = stops.next() => {
            // The tasks that were given up clear their spinners first.
            tokio::task::yield_now().await;
            tell(creations.iter().map(AsRef::as_ref), output);
            Ok(stop.exit())
        }
    }
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
    note_bypass(&sandbox.services, output);
    Ok(())
}

/// Way to wait for a creation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    /// Whether the id must be known as soon as there is one.
    pub(super) quick: bool,
    /// Whether not to wait until it runs.
    pub(super) no_wait: bool,
    /// Whether it is the only one, and may show what is done.
    pub(super) alone: bool,
}

/// A creation under way, and what is known of its sandbox.
#[derive(Debug)]
pub(super) struct Creation {
    controller: Controller,
    request: CreateSandboxRequest,
    since: Instant,
    /// How long it is waited for.
    wait: Duration,
    known: Mutex<Option<Sandbox>>,
}

impl Creation {
    /// Prepares a creation that is waited for so long from now on.
    pub(super) fn new(
        controller: &Controller,
        request: CreateSandboxRequest,
        wait: Duration,
    ) -> Self {
        let (controller, since) = (controller.clone(), Instant::now());
        Self { controller, request, since, wait, known: Mutex::default() }
    }

    /// Controller that was asked.
    pub(super) fn controller(&self) -> &Controller {
        &self.controller
    }

    /// Sandbox as it was last heard of; none before the controller has answered.
    pub(super) fn known(&self) -> Option<Sandbox> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn learn(&self, sandbox: &Sandbox) {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(sandbox.clone());
    }

    /// Asks for the sandbox and waits until it runs.
    ///
    /// # Errors
    /// When the creation failed, or it is not known how it ends.
    pub(super) async fn finish(&self, way: Way, output: Output) -> Result<Sandbox, Failure> {
        let Way { quick, no_wait, alone } = way;
        let wait = self.wait;
        let spinner = Spinner::new(output.json || !alone || no_wait, "asking the controller");
        // With a person watching, showing the steps is worth an additional call.
        let at_once = quick || no_wait || spinner.shown();
        let silent = if at_once { Duration::ZERO } else { SILENT.min(wait) };
        let sandbox = self.ask(silent).await?;
        if no_wait || settled(&sandbox, Phase::Running)? {
            return Ok(sandbox);
        }
        // Without a terminal each step is a line, so that logs show what was waited for.
        let mut told = String::new();
        let followed = self.controller.follow_since(&sandbox.id, self.since, wait, |sandbox| {
            self.learn(sandbox);
            let now = progress(sandbox);
            if spinner.shown() {
                spinner.say(now);
            } else if alone && !quick && now != told && sandbox.phase() == Phase::Creating {
                output.note(&now);
                told = now;
            }
            settled(sandbox, Phase::Running)
        });
        followed.await.map_err(|failure| match failure.transient {
            true => failure.hint(self.next_steps()),
            false => failure,
        })
    }

    /// Repeats the call until there is an answer: a request_id is never executed twice.
    ///
    /// # Errors
    /// When it was refused, or there was no answer until the deadline.
    pub(super) async fn ask(&self, silent: Duration) -> Result<Sandbox, Failure> {
        let wait = prost_types::Duration::try_from(silent).ok();
        let request = CreateSandboxRequest { wait, ..self.request.clone() };
        let mut heard = false;
        loop {
            let mut client = self.controller.sandboxes.clone();
            let failure = match answer(client.create_sandbox(request.clone())).await {
                Ok(response) => {
                    let sandbox = promised(response.sandbox)?;
                    self.learn(&sandbox);
                    // For `@last`; a home that cannot be written is no reason to fail.
                    self.controller.state.set(Slot::Last, &sandbox.id).ok();
                    return Ok(sandbox);
                }
                Err(failure) => failure,
            };
            // The call may have arrived: ask again. If it cannot have arrived, fail at once, unless
            // there is only too much to do.
            let unknown = failure.transient && (heard || !failure.unreached);
            if !unknown && !failure.is_overload() {
                return Err(failure);
            }
            heard |= !failure.unreached && failure.transient;
            let pause = failure.retry_after.unwrap_or(AGAIN).min(AGAIN_MAX);
            if self.since.elapsed() + pause >= self.wait {
                return Err(failure.hint(self.next_steps()));
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Next steps where it is not known how the creation ends.
    fn next_steps(&self) -> String {
        let key = &self.request.request_id;
        let again = format!(
            "with --request-id {key} and the same flags, `create` never makes a second one"
        );
        match self.known() {
            Some(sandbox) => {
                let id = sandbox.id;
                format!(
                    "`sandboxctl wait {id} --for running` waits for it, `sandboxctl rm {id}` deletes it; {again}"
                )
            }
            None => format!(
                "it may be created all the same: {again}; `sandboxctl ls` lists what there is"
            ),
        }
    }
}

/// Tells what goes on without us.
pub(super) fn tell<'a>(creations: impl IntoIterator<Item = &'a Creation>, output: Output) {
    for creation in creations {
        let message = match creation.known() {
            Some(sandbox) if sandbox.phase() != Phase::Creating => continue,
            Some(sandbox) => {
                format!("interrupted, and the creation goes on: {}", progress(&sandbox))
            }
            None => "interrupted before the controller has answered".into(),
        };
        Failure::local(message).hint(creation.next_steps()).print(output.json);
    }
}

fn progress(sandbox: &Sandbox) -> String {
    let node =
        if sandbox.node.is_empty() { String::new() } else { format!(" on {}", sandbox.node) };
    format!("{}{node}: {}", sandbox.id, sandbox.progress().name())
}

pub(super) fn random_key() -> Result<String, Failure> {
    let mut bytes = [0_u8; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| Failure::local(format!("cannot get random numbers: {error}")))?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid().to_string())
}

#[cfg(test)]
mod tests {
    use super::{super::parse, *};

    #[test]
    fn create_refuses_malformed_pairs_services_and_times() {
        let line = "--env A=b=c --meta user=ada --expose web=8080 --expose 81 --dhcp";
        let create: Create = parse(line).expect(line);
        assert_eq!((create.count, create.wait), (1, Duration::from_secs(300)));
        let wrong = [
            "--env A",
            "--egress some",
            "--env =b",
            "--expose web=0",
            "--expose x=y",
            "--expose 65536",
        ];
        for wrong in
            wrong.into_iter().chain(["--count 0", "--wait 5d", "--memory 2x", "--disk 512m"])
        {
            assert!(parse::<Create>(wrong).is_err(), "{wrong}");
        }
    }
}
