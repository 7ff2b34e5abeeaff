//! Access to sandboxes: a model of a shim and its helper, one per conversation. The helper handles
//! an order at once, late or never, and observes the order's deadline; the shim answers as
//! `agent::shim` does. The agent's and the controller's parts are the shipped ones: their timeouts
//! and the callers' answers are tested.

use std::{io, sync::Arc, time::Duration};

use agent::{
    clock::Clock,
    journal::{Phase, Record},
    pve::fake::FakeCluster,
    sandbox::exec::shims::Shims,
};
use futures_util::{SinkExt, StreamExt};
use prost::Message as _;
use proto::{
    Reason,
    sandbox::v1::ExecExit,
    shim::v1::{self as wire, request, response},
};
use tokio::{net::UnixStream, time::sleep};
use tokio_util::{
    bytes::Bytes,
    codec::{Framed, LengthDelimitedCodec},
};

use crate::{chance::Chance, clock::SimClock, mutant::Mutation, watch::Watch};

/// Longest time between an order's deadline and the shim's answer.
const WORD: Duration = Duration::from_secs(1);
/// Longest stall of a helper, in milliseconds.
const STANDS_MS: u64 = 40_000;

/// Shims and helpers of one node.
#[derive(Debug, Clone)]
pub(crate) struct Doors {
    pub(crate) pve: FakeCluster,
    pub(crate) watch: Arc<Watch>,
    pub(crate) clock: SimClock,
    pub(crate) chance: Arc<Chance>,
    pub(crate) mutation: Option<Mutation>,
}

#[async_trait::async_trait]
impl Shims for Doors {
    async fn find(&self, _: &Record) -> Option<UnixStream> {
        None
    }

    /// Connects to a sandbox, and checks I5: only the sandbox that was named, and only in its life.
    async fn start(&self, record: &Record) -> io::Result<UnixStream> {
        let guest = self.pve.guests().remove(&record.vmid);
        let mark = guest.as_ref().and_then(|guest| guest.config.mark());
        if mark != Some(record.mark()) {
            let (id, vmid) = (record.id, record.vmid);
            self.watch.wrong(format!("I5: {vmid} was entered for {id} and is {mark:?}"));
        }
        if !matches!(record.phase, Phase::Running | Phase::Paused) {
            self.watch.wrong(format!("I5: {} was entered and is {:?}", record.id, record.phase));
        }
        let (ours, theirs) = UnixStream::pair()?;
        tokio::spawn(self.clone().serve(ours));
        Ok(theirs)
    }
}

/// Answer to the agent.
enum Answer {
    Runs,
    No(Reason),
    /// No answer: the connection breaks.
    Breaks,
    /// No answer: the connection stays open.
    Silence,
}

impl Doors {
    async fn serve(self, stream: UnixStream) {
        let mut frames = Framed::new(stream, LengthDelimitedCodec::new());
        let Some(Ok(frame)) = frames.next().await else { return };
        let request = wire::Request::decode(frame.freeze()).expect("a request");
        let Some(request::Message::Start(start)) = request.message else { return };
        let number = start.title.strip_prefix("run ").and_then(|number| number.parse().ok());
        let number = number.expect("the title of a command");
        let answer = self.decide(&start, number).await;
        let say =
            |message| -> Bytes { wire::Response { message: Some(message) }.encode_to_vec().into() };
        let messages = match answer {
            Answer::Runs => vec![
                response::Message::Started(wire::Started::default()),
                response::Message::Exit(ExecExit::default()),
            ],
            Answer::No(reason) => vec![response::Message::Refused(wire::Refused {
                reason: reason.name().to_owned(),
                message: "the simulation says so".to_owned(),
            })],
            Answer::Breaks => return,
            // Until the agent closes the connection.
            Answer::Silence => {
                while let Some(Ok(_)) = frames.next().await {}
                return;
            }
        };
        for message in messages {
            // The agent may be gone.
            drop(frames.send(say(message)).await);
        }
    }

    fn left(&self, start: &wire::Start) -> Duration {
        Duration::from_millis(start.start_by_ms.saturating_sub(self.clock.moment().up_ms))
    }

    /// Decides whether an order runs, and what the shim answers.
    async fn decide(&self, start: &wire::Start, number: u64) -> Answer {
        let boot = self.clock.moment().boot;
        let stands = match self.chance.below(10) {
            0..5 => self.chance.below(50),
            5 => return Answer::No(Reason::FieldInvalid),
            _ => self.chance.below(STANDS_MS),
        };
        let (stands, left) = (Duration::from_millis(stands), self.left(start));
        // The helper, whose result may not reach the shim any more.
        let (doors, by) = (self.clone(), start.clone());
        let helper = tokio::spawn(async move {
            sleep(stands).await;
            let in_time = !doors.left(&by).is_zero() || doors.mutation == Some(Mutation::GivenUp);
            // A power cut ends the helper, too.
            let runs = in_time && doors.clock.moment().boot == boot;
            if runs {
                doors.watch.ran(number);
            }
            runs
        });
        if self.chance.percent(10) {
            return Answer::Silence;
        }
        let runs = tokio::time::timeout(left + WORD, helper).await;
        match runs.map(|runs| runs.expect("no panic")) {
            Ok(true) if self.chance.percent(10) => Answer::Breaks,
            Ok(true) => Answer::Runs,
            // The helper refused the order.
            Ok(false) => Answer::No(Reason::ExecFailed),
            Err(_) if self.mutation == Some(Mutation::GivenUp) => Answer::No(Reason::ExecFailed),
            Err(_) => Answer::No(Reason::OutcomeUnknown),
        }
    }
}
