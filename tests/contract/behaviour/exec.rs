//! Commands, through the suite's own shim and the helper that it starts inside.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use agent::{
    shim::{
        Host, OUTPUT_BYTES_MAX, Parts,
        client::{self, Attachment, Refused},
        serve,
    },
    sys::image,
};
use helper::{FileTask, Order, Task, User};
use proto::{
    Reason,
    sandbox::v1::ExecExit,
    shim::v1::{HangUp, Start, Stdin, request, response},
};
use tokio::{
    net::{UnixListener, UnixStream},
    time::{Instant, timeout},
};

use crate::stage::{DEADLINE, Shown, Stage};

/// Number of concurrent callers.
const CALLERS: usize = 64;
/// Pause of a caller after the answer that too many commands run.
const PAUSE: Duration = Duration::from_millis(5);

/// Runs the shortest commands and operations on files from 64 concurrent callers. A long command
/// beside them is not disturbed, and each of the others is answered.
pub(super) async fn short_commands_do_not_end_a_long_one(stage: &dyn Stage) -> Shown {
    let order = stage.started().await;
    let (host, calls) = (stage.inside(order.vmid), stage.calls());
    // Commands inside take real time, whatever clock the suite has here.
    let run = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        runtime.expect("a runtime").block_on(burst(host, calls));
    });
    run.await.expect("none is lost");
    stage.destroy(&order).await;
    Shown::Yes
}

async fn burst(host: Arc<dyn Host>, calls: usize) {
    let serving = Serving::start(host);
    let shim = &serving.shim;

    let mut long = shim.start(program("read x; exit 9")).await;
    let next = Arc::new(AtomicUsize::new(0));
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..CALLERS {
        let (shim, next) = (Arc::clone(shim), Arc::clone(&next));
        callers.spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= calls {
                    return;
                }
                let (task, code) = short(number);
                let started = shim.start(task).await;
                let exit = end(started).await;
                assert_eq!((exit.code, exit.signal), (code, 0), "call {number}");
            }
        });
    }
    while let Some(done) = callers.join_next().await {
        done.expect("each call is answered");
    }
    let line = Stdin { data: "end\n".into(), eof: true, ..Stdin::default() };
    long.input.send(request::Message::Stdin(line)).await.expect("it runs");
    assert_eq!(end(long).await.code, 9, "the long one has run through it all");
}

fn program(line: &str) -> Task {
    Task::Program(["/bin/sh", "-c", line].map(str::to_owned).to_vec())
}

/// Returns one of the shortest tasks, and its exit code.
fn short(number: usize) -> (Task, u32) {
    let path = || "/etc/passwd".to_owned();
    match number % 6 {
        0 => (Task::Program(vec!["true".to_owned()]), 0),
        1 => (Task::Program(vec!["/nosuch".to_owned()]), 127),
        2 => (program("exit 3"), 3),
        3 => (Task::Files(FileTask::Stat { path: path() }), 0),
        4 => (Task::Files(FileTask::Read { path: path(), offset: 0, length: 0 }), 0),
        _ => (
            Task::Files(FileTask::List { path: "/".to_owned(), limit: 100, after: String::new() }),
            0,
        ),
    }
}

/// Socket of a shim.
pub(super) struct Shim {
    pub(super) socket: std::path::PathBuf,
}

/// Shim of the suite's own, which ends with it.
pub(super) struct Serving {
    pub(super) shim: Arc<Shim>,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
    _dir: tempfile::TempDir,
}

impl Serving {
    pub(super) fn start(host: Arc<dyn Host>) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let shim = Arc::new(Shim { socket: dir.path().join("shim.sock") });
        let listener = UnixListener::bind(&shim.socket).expect("a socket");
        let parts = Parts {
            host,
            image: image::sealed("pve-sandbox-helper", image::HELPER).expect("an image"),
            dir: dir.path().to_owned(),
            output_bytes_max: OUTPUT_BYTES_MAX,
            ids: dir.path().join("ids"),
            socket: shim.socket.clone(),
        };
        Self { shim, task: tokio::spawn(serve(listener, parts)), _dir: dir }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shim {
    /// Starts a task, and retries if it is told to.
    async fn start(&self, task: Task) -> Attachment {
        static SERIAL: AtomicUsize = AtomicUsize::new(0);
        let name = format!("x-{}", SERIAL.fetch_add(1, Ordering::Relaxed));
        let mark = format!("PVE_SANDBOX_EXEC=contract-{}-{name}", std::process::id());
        let (key, value) = mark.split_once('=').expect("both");
        let env = vec![
            ("PATH".to_owned(), "/usr/bin:/bin".to_owned()),
            (key.to_owned(), value.to_owned()),
        ];
        let order = Order { task, user: User::Id(0), cwd: Some("/".to_owned()), env };
        let start = Start {
            exec_id: name,
            order: serde_json::to_vec(&order).expect("JSON").into(),
            timeout_ms: 600_000,
            mark,
            ..Start::default()
        };
        loop {
            let stream = UnixStream::connect(&self.socket).await.expect("it listens");
            let message = request::Message::Start(start.clone());
            match client::attach(stream, message, Instant::now() + DEADLINE).await {
                Ok(attachment) => return attachment,
                Err(Refused::No(Reason::TooManyCalls, _)) => {
                    tokio::time::sleep(PAUSE).await;
                }
                Err(refused) => panic!("it was not started: {refused:?}"),
            }
        }
    }
}

/// Reads all output of a task until its exit.
async fn end(mut running: Attachment) -> ExecExit {
    loop {
        let next = timeout(DEADLINE, running.output.next()).await.expect("in time");
        match next.expect("the shim lives").expect("a message") {
            response::Message::Exit(exit) => {
                drop(running.input.send(request::Message::HangUp(HangUp {})).await);
                return exit;
            }
            response::Message::Stdout(_)
            | response::Message::Stderr(_)
            | response::Message::Done(_) => {}
            other @ (response::Message::Started(_)
            | response::Message::Refused(_)
            | response::Message::Execs(_)
            | response::Message::Outputs(_)
            | response::Message::Eof(_)) => panic!("it was lost: {other:?}"),
        }
    }
}
