//! A command that runs, to its end.

use std::{sync::Arc, time::Duration};

use proto::reason;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Place,
    attach::{Attached, Ends},
    failed,
    order::{Exit, Input, Output},
    same_boot,
    streams::{self, Keyboard, Pipe, Sender},
    tree::Tree,
};
use crate::{
    journal::Record,
    run::{self, Running},
    sandbox::{Error, Sandboxes},
};

/// How long `lxc-attach` may take to end once all that it ran has.
const FOLLOW: Duration = Duration::from_secs(2);
/// How long a caller may take to read what is left once the command has ended.
const REST: Duration = Duration::from_secs(60);
/// Signals that may wait to be sent.
const SIGNALS: usize = 8;
/// The code of a command whose time was over.
const TIMED_OUT: u8 = 124;

/// A command that runs.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) sandboxes: Arc<Sandboxes>,
    pub(super) record: Arc<Record>,
    pub(super) process: Running,
    pub(super) ends: Ends,
    pub(super) tree: Tree,
    pub(super) timeout: Duration,
    pub(super) _place: Place,
}

/// What ended a command.
#[derive(Debug)]
enum End {
    /// Itself.
    Own,
    /// Its time was over.
    TimedOut,
    /// Nobody listens any more.
    HungUp,
    /// The agent stops.
    Stopping,
}

impl Session {
    /// Runs it to its end. The last thing sent is an exit or an error.
    pub(super) async fn run(self, input: mpsc::Receiver<Input>, output: Sender) {
        let Self { sandboxes, record, process, ends, tree, timeout: time, _place } = self;
        let ended = CancellationToken::new();
        let (signal, signals) = mpsc::channel(SIGNALS);
        let life = Life { process, tree, until: Instant::now() + time };
        let stopping = sandboxes.tasks().stopping().clone();
        let live = async {
            let result = life.live(&output, signals, &stopping).await;
            ended.cancel();
            result
        };
        let (end, exit) = match ends {
            Ends::Pipes { stdin, stdout, stderr } => {
                let out = streams::pump(stdout, Output::Stdout, output.clone(), ended.clone());
                let err = streams::pump(stderr, Output::Stderr, output.clone(), ended.clone());
                let feed = streams::feed(input, Pipe(Some(stdin)), signal, ended.clone());
                let pumps = async { tokio::try_join!(out, err).map(drop) };
                let (result, (), ()) = tokio::join!(live, feed, rest(pumps, &ended));
                result
            }
            Ends::Terminal(terminal) => {
                let pump = streams::pump_terminal(terminal.clone(), output.clone());
                let keyboard = Keyboard { terminal, closed: false };
                let feed = streams::feed(input, keyboard, signal, ended.clone());
                let (result, (), ()) = tokio::join!(live, feed, rest(pump, &ended));
                result
            }
        };
        let last = last(&sandboxes, &record, end, exit).await;
        // A caller that does not read at all finds its stream ended without an exit.
        drop(timeout(REST, output.send(last)).await);
    }
}

/// Runs the pumps; once the command has ended, not for ever.
async fn rest(pumps: impl Future<Output = std::io::Result<()>>, ended: &CancellationToken) {
    let late = async {
        ended.cancelled().await;
        tokio::time::sleep(REST).await;
    };
    tokio::select! {
        result = pumps => if let Err(error) = result {
            tracing::warn!(%error, "output of a command was lost");
        },
        () = late => tracing::warn!("output of a command was not read in time"),
    }
}

/// The process and what ends it.
struct Life {
    process: Running,
    tree: Tree,
    until: Instant,
}

impl Life {
    async fn live(
        mut self,
        output: &Sender,
        mut signals: mpsc::Receiver<i32>,
        stopping: &CancellationToken,
    ) -> (End, std::io::Result<run::Exit>) {
        let end = loop {
            tokio::select! {
                biased;
                exit = self.process.wait() => return (End::Own, exit),
                () = output.closed() => break End::HungUp,
                () = sleep_until(self.until) => break End::TimedOut,
                () = stopping.cancelled() => break End::Stopping,
                Some(number) = signals.recv() => self.tree.signal(number).await,
            }
        };
        self.tree.end().await;
        if timeout(FOLLOW, self.process.wait()).await.is_err() {
            Attached::end(&mut self.process).await;
        }
        (end, self.process.wait().await)
    }
}

/// The last message.
async fn last(
    sandboxes: &Sandboxes,
    record: &Record,
    end: End,
    exit: std::io::Result<run::Exit>,
) -> Result<Output, Error> {
    let code = match exit {
        Ok(run::Exit::Code(code)) => u8::try_from(code).ok(),
        Ok(run::Exit::Signal(_)) | Err(_) => None,
    };
    let signal = code.and_then(|code| code.checked_sub(128)).filter(|n| *n <= 64).unwrap_or(0);
    match (end, code) {
        (End::TimedOut, _) => Ok(Output::Exit(Exit { code: TIMED_OUT, signal, timed_out: true })),
        (End::Stopping, _) => {
            Err(Error::new(reason::SHUTTING_DOWN, "the agent stopped, and the command with it"))
        }
        (End::HungUp, _) => Err(failed("the caller hung up".to_owned())),
        (End::Own, None) => Err(failed("lxc-attach was killed; the command was lost".to_owned())),
        // What ends with its sandbox says nothing about itself.
        (End::Own, Some(_)) if signal != 0 && !still_runs(sandboxes, record).await => {
            Err(failed("the sandbox stopped while the command ran".to_owned()))
        }
        (End::Own, Some(code)) => Ok(Output::Exit(Exit { code, signal, timed_out: false })),
    }
}

async fn still_runs(sandboxes: &Sandboxes, record: &Record) -> bool {
    same_boot(sandboxes, record) && sandboxes.pve().running(record.vmid).await
}
