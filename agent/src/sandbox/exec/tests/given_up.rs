//! A command that is reported as not run never runs; one that may run is reported as such.

use std::sync::atomic::Ordering;

use proto::shim::v1::request::Message;

use super::{attach::named, *};
use crate::{
    sandbox::access::files::FileContent,
    shim::client::{Refused, attach},
};

const STOP: i32 = nix::libc::SIGSTOP;
const CONT: i32 = nix::libc::SIGCONT;

/// Files that the commands of a test write.
struct Marks(tempfile::TempDir);

impl Marks {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("tempdir"))
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// Builds a command that appends a line to this file.
    fn leave(&self, name: &str) -> Order {
        shell(&format!("echo ran >>{}", self.path(name)))
    }

    fn left(&self, name: &str) -> usize {
        let text = std::fs::read_to_string(self.path(name)).unwrap_or_default();
        text.lines().count()
    }
}

/// Simulates a freeze right after the agent's check. A helper that is only stopped is continued by
/// its shim.
fn freeze(rig: &Rig) {
    rig.pve.frozen_later.store(true, Ordering::Relaxed);
    rig.signal_helpers(STOP);
}

#[tokio::test]
async fn request_given_up_while_frozen_never_runs() {
    let (rig, marks) = (Rig::new().await, Marks::new());
    assert_eq!(rig.run(argv(&["true"])).await.code(), 0);
    freeze(&rig);
    let begun = Instant::now();
    let content = FileContent { path: marks.path("file"), content: "x".into(), mode: Some(0o600) };
    let (nobody, one) = (User::Id(0), SandboxRef::Id(id(1)));
    let (unnamed, first, second, written) = tokio::join!(
        rig.start(marks.leave("unnamed")),
        rig.start(named("n", marks.leave("named"))),
        rig.start(named("n", marks.leave("named"))),
        rig.execs.files(&one, &nobody).write(vec![content]),
    );
    for error in [
        unnamed.expect_err("nobody started it"),
        first.expect_err("nobody started it"),
        second.expect_err("nobody started it"),
        written.expect_err("nobody wrote it"),
    ] {
        assert_eq!(error.reason, Reason::OutcomeUnknown, "{error}");
    }
    assert!(begun.elapsed() > START, "{:?}", begun.elapsed());
    rig.pve.frozen_later.store(false, Ordering::Relaxed);
    rig.signal_helpers(CONT);
    // The helper takes orders in sequence: once this has run, the earlier ones were decided.
    assert_eq!(rig.run(argv(&["true"])).await.code(), 0);
    assert_eq!((marks.left("unnamed"), marks.left("named")), (0, 0));
    assert!(!std::path::Path::new(&marks.path("file")).exists());
    // Nothing was run under the name, so it is free.
    assert_eq!(rig.run(named("n", marks.leave("named"))).await.code(), 0);
    assert_eq!(rig.run(named("n", marks.leave("named"))).await.code(), 0);
    assert_eq!(marks.left("named"), 1);
    rig.until_no_place_is_taken().await;
}

#[tokio::test]
async fn late_order_is_refused_and_leaves_its_exec_id_free() {
    let (rig, marks) = (Rig::new().await, Marks::new());
    assert_eq!(rig.run(argv(&["true"])).await.code(), 0);
    let record = rig.sandboxes.up(&SandboxRef::Id(id(1))).expect("up");
    let start = |start_by_ms: u64| {
        let order = named("late", marks.leave("late"));
        let start = super::start(&record, &order, 0).expect("an order");
        Message::Start(wire::Start { start_by_ms, ..start })
    };
    for before in [1, 60_000] {
        let stream = rig.shims.find(&record).await.expect("a shim");
        let late = start(helper::up_ms() - before);
        match attach(stream, late, Instant::now() + DEADLINE).await {
            Err(Refused::No(reason, message)) => {
                assert_eq!(reason, Reason::ExecFailed);
                assert!(message.contains("was not run"), "{message}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(marks.left("late"), 0);
    assert_eq!(rig.run(named("late", marks.leave("late"))).await.code(), 0);
    assert_eq!(marks.left("late"), 1);
    // An order from an agent that sets no deadline gets the shim's own.
    let stream = rig.shims.find(&record).await.expect("a shim");
    attach(stream, start(0), Instant::now() + DEADLINE).await.expect("known by its name");
}

#[tokio::test]
async fn order_of_a_dying_helper_is_reported_as_lost() {
    let (rig, marks) = (Rig::new().await, Marks::new());
    assert_eq!(rig.run(argv(&["true"])).await.code(), 0);
    freeze(&rig);
    let killed = async {
        // Until the shim has sent the order; a helper that is killed before that loses no order.
        sleep(Duration::from_secs(1)).await;
        rig.signal_helpers(9);
        rig.pve.frozen_later.store(false, Ordering::Relaxed);
    };
    let (started, ()) = tokio::join!(rig.start(named("n", marks.leave("n"))), killed);
    assert_eq!(started.expect_err("lost").reason, Reason::ExecLost);
    let again = rig.start(named("n", marks.leave("n"))).await.expect_err("not twice");
    assert_eq!((again.reason, marks.left("n")), (Reason::ExecLost, 0));
    assert_eq!(rig.run(argv(&["true"])).await.code(), 0);
}
