//! Shims that exist and never answer.

use super::*;
use crate::sandbox::access::files::{FileContent, UnpackRules};

/// Accepts every connection, and says nothing.
#[derive(Debug)]
struct Silent {
    held: std::sync::Mutex<Vec<UnixStream>>,
}

#[async_trait::async_trait]
impl shims::Shims for Silent {
    async fn find(&self, _: &Record) -> Option<UnixStream> {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        self.held.lock().expect("no panic").push(theirs);
        Some(ours)
    }

    async fn start(&self, _: &Record) -> std::io::Result<UnixStream> {
        unreachable!("one is found")
    }
}

/// Runs a call, which must fail with this reason before its controller stops waiting.
async fn ends<T>(
    what: &str,
    controller: u64,
    wanted: Reason,
    call: impl Future<Output = Result<T, Error>>,
) {
    let begun = Instant::now();
    let error = call.await.map(drop).expect_err("nobody answered");
    let took = begun.elapsed();
    assert_eq!(error.reason, wanted, "{what}: {error}");
    // With some time left for the way to the controller.
    // The clock of the test has ticks of a millisecond.
    let left = Duration::from_millis(990);
    assert!(took + left <= Duration::from_secs(controller), "{what}: {took:?}");
}

#[tokio::test]
async fn calls_to_a_silent_shim_end_before_controller_deadlines() {
    // The sandbox comes up in real time: its probe runs a process.
    let rig = Rig::new().await;
    tokio::time::pause();
    let silent = Silent { held: std::sync::Mutex::default() };
    let execs = Execs::new(Arc::clone(&rig.sandboxes), Arc::new(silent));
    let (name, root) = (SandboxRef::Id(id(1)), User::Id(0));
    let path = || "/etc/passwd".to_owned();
    let input = || mpsc::channel(1).1;
    // As in controller/src/node/client.rs and controller/src/sandbox/files.rs.
    let (start, control, list, files) = (16, 10, 5, 18);
    let unknown = Reason::OutcomeUnknown;

    ends("start", start, unknown, execs.start(argv(&["true"]), input())).await;
    let named = Order { exec_id: Some("build".into()), ..argv(&["true"]) };
    ends("start by name", start, unknown, execs.start(named, input())).await;
    let attach =
        Attach { sandbox: name, exec_id: "build".into(), stdout_offset: 0, stderr_offset: 0 };
    ends("attach", start, Reason::ExecFailed, execs.attach(attach, input())).await;
    let stdin = Control::Stdin { offset: 0, data: Bytes::from_static(b"x"), eof: false };
    let resize = Control::Resize(Window { rows: 1, columns: 1 });
    for (what, act) in [("stdin", stdin), ("resize", resize), ("signal", Control::Signal(9))] {
        ends(what, control, unknown, execs.control(&name, "build".to_owned(), act)).await;
    }
    ends("list", list, Reason::ExecFailed, execs.list(&name)).await;

    ends("stat", files, unknown, execs.files(&name, &root).stat(path())).await;
    let list = execs.files(&name, &root).list(path(), (9, String::new()));
    ends("list a directory", files, unknown, list).await;
    ends("read", files, unknown, execs.files(&name, &root).read(path(), (0, 0))).await;
    ends("download", files, unknown, execs.files(&name, &root).download(path())).await;
    ends("remove", files, unknown, execs.files(&name, &root).remove(path(), false)).await;
    let file = FileContent { path: path(), content: Bytes::from_static(b"x"), mode: Some(0o600) };
    ends("write", files, unknown, execs.files(&name, &root).write(vec![file])).await;
    let (_archive, bytes) = mpsc::channel(1);
    let upload = execs.files(&name, &root).upload(path(), UnpackRules::default(), bytes);
    ends("upload", files, unknown, upload).await;
}
