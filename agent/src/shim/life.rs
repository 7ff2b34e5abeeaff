//! Lifecycle of one command: its input, output, clock, signals and end.

use std::{io, sync::Arc, time::Duration};

use bytes::Buf;
use futures_util::future;
use proto::sandbox::v1::ExecExit;
use tokio::{
    io::AsyncWriteExt,
    net::unix::pipe::{Receiver, Sender},
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Host,
    helper::{Ended, Ends, Spawned, Third},
    output::{self, Source},
    session::{End, Session, Shared, Title},
    tree::Tree,
};

/// Longest wait for a command to end once all its processes have been killed.
const FOLLOW: Duration = Duration::from_secs(2);
/// Most times that the processes of a command are ended. A look at the cgroups can miss one that is
/// just moved to another, so it is repeated while the command is not seen to have ended.
const TRIES: u32 = 3;
/// Resolution of the timeout clock: time in which the sandbox is frozen does not count.
const TICK: Duration = Duration::from_millis(250);
/// Interval between two looks at the CPU time of a command without a caller.
const LOOK: Duration = Duration::from_secs(5);
/// CPU time between two looks that counts as activity: 1 % of a core. Servers that wait use less.
const ACTIVE: Duration = Duration::from_millis(50);
/// Most signals that may wait to be sent.
const SIGNALS: usize = 8;
/// Exit code of a command that timed out.
const TIMED_OUT: u32 = 124;
/// End of file, typed on a terminal.
const EOT: &[u8] = b"\x04";

/// Cause of a session's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Own((u8, u8)),
    Unseen(&'static str),
    HelperGone,
    TimedOut,
    HungUp,
}

/// Supervises a started command until its end, on a task of its own.
pub(super) fn begin(
    title: Title,
    spawned: Spawned,
    host: Arc<dyn Host>,
    mark: String,
    time: Duration,
    shared: Arc<Shared>,
) -> Arc<Session> {
    let Spawned { ends: Ends { stdin, stdout, third }, leader, exit, never_ran: _ } = spawned;
    let (stderr, sizes) = match third {
        Third::Stderr(stderr) => (Some(stderr), None),
        Third::Sizes(sizes) => (None, Some(sizes)),
    };
    let (signal, signals) = mpsc::channel(SIGNALS);
    let session = Session::new(title, shared, signal, sizes);
    let tree = Tree { host: Arc::clone(&host), leader, mark };
    let life = Life { session: Arc::clone(&session), host, tree, exit, signals };
    tokio::spawn(life.run(stdin, stdout, stderr, time));
    session
}

struct Life {
    session: Arc<Session>,
    host: Arc<dyn Host>,
    tree: Tree,
    exit: oneshot::Receiver<Ended>,
    signals: mpsc::Receiver<i32>,
}

impl Life {
    async fn run(
        mut self,
        mut stdin: Sender,
        stdout: Receiver,
        stderr: Option<Receiver>,
        time: Duration,
    ) {
        let session = Arc::clone(&self.session);
        let (ended, hung_up) = (CancellationToken::new(), CancellationToken::new());
        let live = async {
            let cause = self.live(time, &hung_up).await;
            ended.cancel();
            cause
        };
        let pump = |(output, source)| {
            let (session, ended) = (&session, &ended);
            async move {
                let open = output::pump(session, output, source, ended).await?;
                Ok::<_, io::Error>(open.map(|source| (output, source)))
            }
        };
        let (cause, open) = match stderr {
            Some(stderr) => {
                let sources = [(0, Source::Pipe(stdout)), (1, Source::Pipe(stderr))];
                let feeding = &session;
                // Dropping `stdin` at the end closes the pipe.
                let fed = ended.run_until_cancelled(async move { feed(feeding, &mut stdin).await });
                let pumps = future::try_join_all(sources.map(pump));
                let (cause, _, open) = tokio::join!(live, fed, pumps);
                (cause, open)
            }
            None => {
                let fed = ended.run_until_cancelled(async {
                    feed(&session, &mut stdin).await;
                    drop(timeout(Duration::from_secs(1), stdin.write_all(EOT)).await);
                });
                let pumped = pump((0, Source::Terminal(stdout)));
                let pumped = async {
                    // Dropping the pump closes the terminal: its relay sees that nobody reads.
                    let open = hung_up.run_until_cancelled(pumped).await.transpose()?;
                    Ok::<_, io::Error>(vec![open.flatten()])
                };
                let (cause, _, open) = tokio::join!(live, fed, pumped);
                (cause, open)
            }
        };
        let end = match (cause, &open) {
            (_, Err(error)) => {
                tracing::warn!(%error, "the output of a command was lost");
                End::Lost("its output could not be kept".to_owned())
            }
            (Cause::Own((code, 0)), _) => exit(code.into(), 0, false),
            (Cause::Own((_, signal)), _) => exit(128 + u32::from(signal), signal.into(), false),
            (Cause::TimedOut, _) => exit(TIMED_OUT, 0, true),
            (Cause::HungUp, _) => End::Lost("its caller hung up, and it was ended".to_owned()),
            (Cause::Unseen(why), _) => End::Lost(why.to_owned()),
            (Cause::HelperGone, _) => {
                End::Lost("what supervised it inside the sandbox was killed".to_owned())
            }
        };
        let background: Vec<_> = open.into_iter().flatten().flatten().collect();
        session.end(end, !background.is_empty());
        if background.is_empty() {
            return;
        }
        let follow = |(output, source)| output::follow(Arc::clone(&session), output, source);
        tokio::select! {
            biased;
            () = session.background_dropped() => {}
            _ = future::join_all(background.into_iter().map(follow)) => {}
        }
        session.background_ended();
    }

    /// Waits for the end of the command, or ends it. Cancels `hung_up` when a hang-up closes its
    /// terminal.
    async fn live(&mut self, mut left: Duration, hung_up: &CancellationToken) -> Cause {
        let session = Arc::clone(&self.session);
        let spares = session.title.spare_background;
        let mut last = Instant::now();
        let mut looked = (last, Duration::ZERO);
        let cause = loop {
            tokio::select! {
                biased;
                exit = &mut self.exit => match exit {
                    Ok(Ok(how)) => return Cause::Own(how),
                    Ok(Err(why)) => break Cause::Unseen(why),
                    Err(_) => break Cause::HelperGone,
                },
                () = session.hung_up(), if !hung_up.is_cancelled() => {
                    if !spares {
                        break Cause::HungUp;
                    }
                    if self.hang_up(hung_up).await {
                        return Cause::HungUp;
                    }
                }
                Some(number) = self.signals.recv() => self.tree.signal(number).await,
                () = sleep(left.min(TICK)) => {
                    session.expire();
                    self.look(&mut looked).await;
                }
            }
            let now = Instant::now();
            if !self.host.frozen() {
                left = left.saturating_sub(now - last);
            }
            last = now;
            if left.is_zero() {
                break Cause::TimedOut;
            }
        };
        for _ in 0..TRIES {
            // A timeout bounds all that the command has started; the loss of its supervisor does not.
            let none_is_left = if spares && cause != Cause::TimedOut {
                self.tree.hang_up().await
            } else {
                self.tree.end().await
            };
            if !none_is_left || matches!(cause, Cause::HelperGone | Cause::Unseen(_)) {
                break;
            }
            // This lets the kernel catch up, unless the look has missed the command.
            if timeout(FOLLOW, &mut self.exit).await.is_ok() {
                break;
            }
        }
        cause
    }

    /// Hangs up a command whose background is to go on. True when the command itself has ended. One
    /// that ignores SIGHUP has not: it runs on without its terminal, or with the end of its stdin.
    async fn hang_up(&mut self, hung_up: &CancellationToken) -> bool {
        for _ in 0..TRIES {
            let none_is_left = self.tree.hang_up().await;
            hung_up.cancel();
            if timeout(FOLLOW, &mut self.exit).await.is_ok() {
                return true;
            }
            if !none_is_left || self.tree.ignores_hang_up().await {
                break;
            }
        }
        // Not before the signal: half of an input must not pass for the whole.
        self.session.end_stdin();
        false
    }

    /// Looks from time to time whether a command without a caller uses CPU. `looked` is when that
    /// was done before, and the CPU time that it had used by then.
    async fn look(&self, looked: &mut (Instant, Duration)) {
        if looked.0.elapsed() < LOOK || self.session.is_attached() {
            return;
        }
        let used = self.tree.cpu().await;
        if used.saturating_sub(looked.1) >= ACTIVE {
            self.session.works();
        }
        *looked = (Instant::now(), used);
    }
}

fn exit(code: u32, signal: u32, timed_out: bool) -> End {
    End::Exit(ExecExit { code, signal, timed_out })
}

/// Feeds stdin until the command has ended or reads no more, or the input has ended.
async fn feed(session: &Session, to: &mut Sender) {
    while let Some(mut bytes) = session.stdin_next().await {
        while bytes.has_remaining() {
            match to.write(&bytes).await {
                Ok(written) => bytes.advance(written),
                Err(_) => return session.close_stdin(),
            }
        }
        session.stdin_passed();
    }
}
