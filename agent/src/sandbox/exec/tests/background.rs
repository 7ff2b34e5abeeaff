//! After a command has ended: its background processes, and its outputs on the disk.

use std::os::unix::fs::MetadataExt;

use super::{attach::named, *};

/// Files that the commands of a test write.
struct Marks(tempfile::TempDir);

impl Marks {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("tempdir"))
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn lines(&self, name: &str) -> usize {
        std::fs::read_to_string(self.path(name)).unwrap_or_default().lines().count()
    }

    /// Waits until this file has `more` lines more than now.
    async fn until_more(&self, name: &str, more: usize) {
        let (begun, before) = (Instant::now(), self.lines(name));
        while self.lines(name) < before + more {
            assert!(begun.elapsed() < DEADLINE, "{name} has {} lines", self.lines(name));
            sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Builds a line that leaves a writer in the background. The writer counts in a file, until its
/// stdout breaks or the test removes the file `go`.
fn leaves_a_writer(marks: &Marks, name: &str) -> String {
    std::fs::write(marks.path("go"), "").expect("written");
    let (go, mark) = (marks.path("go"), marks.path(name));
    format!(
        "trap '' HUP; (while [ -e {go} ] && sleep 0.02; do echo later || exit; echo >>{mark}; done) & "
    )
}

const TTY: Option<Window> = Some(Window { rows: 24, columns: 80 });

impl Rig {
    /// Bytes on the disk of files without a name.
    fn on_disk(&self) -> u64 {
        let dir = self.shims.dir.path().to_owned();
        let fds = std::fs::read_dir("/proc/self/fd").expect("procfs").flatten();
        let ours = fds.filter(|fd| {
            std::fs::read_link(fd.path()).is_ok_and(|target| target.starts_with(&dir))
        });
        let blocks = ours.filter_map(|fd| Some(std::fs::metadata(fd.path()).ok()?.blocks() * 512));
        blocks.sum()
    }

    async fn info(&self, exec_id: &str) -> ExecInfo {
        let list = self.execs.list(&SandboxRef::Id(id(1))).await.expect("listed");
        list.into_iter().find(|exec| exec.exec_id == exec_id).expect("there")
    }

    /// Reads all output of a command that is available now.
    async fn logs(&self, exec_id: &str) -> (u64, Ran) {
        let (_keep, inputs) = mpsc::channel(1);
        let attach = Attach {
            sandbox: SandboxRef::Id(id(1)),
            exec_id: exec_id.to_owned(),
            stdout_offset: 0,
            stderr_offset: 0,
        };
        let (started, outputs) = self.execs.attach(attach, inputs).await.expect("attached");
        (started.stdout_offset, drain(outputs).await)
    }
}

#[tokio::test]
async fn background_writer_outlives_its_command_without_delaying_it() {
    let (rig, marks) = (Rig::new().await, Marks::new());
    for (name, exec_id, tty) in [
        ("unnamed", None, None),
        ("named", Some("named"), None),
        ("unnamed-tty", None, TTY),
        ("named-tty", Some("named-tty"), TTY),
    ] {
        let line = leaves_a_writer(&marks, name) + "echo before; exit 4";
        let order = Order { tty, exec_id: exec_id.map(str::to_owned), ..shell(&line) };
        let begun = Instant::now();
        let ran = rig.run(order).await;
        assert_eq!(ran.end, Ok(Exit { code: 4, signal: 0, timed_out: false }), "{name}");
        assert!(ran.out().contains("before"), "{name}: {}", ran.out());
        assert!(begun.elapsed() < Duration::from_secs(20), "{name}: {:?}", begun.elapsed());
        // The writer keeps writing.
        marks.until_more(name, 20).await;
    }
    // None of them counts as running: nothing keeps the sandbox from being idle.
    let list = rig.execs.list(&SandboxRef::Id(id(1))).await.expect("listed");
    assert!(list.iter().all(|exec| exec.exit.is_some_and(|exit| exit.code == 4)), "{list:?}");
    // Later output of a named command can be read, up to what exists at that time.
    for name in ["named", "named-tty"] {
        let later = |ran: &Ran| ran.out().matches("later").count();
        let (_, first) = rig.logs(name).await;
        marks.until_more(name, 20).await;
        let (_, second) = rig.logs(name).await;
        assert!(later(&first) >= 20 && later(&second) > later(&first), "{}", later(&second));
        assert_eq!((first.code(), second.code()), (4, 4));
    }
    std::fs::remove_file(marks.path("go")).expect("removed");
    rig.until_none_holds(&marks.path("go")).await;
    rig.until_no_place_is_taken().await;
}

#[tokio::test]
async fn background_processes_do_not_count_as_running_commands() {
    let rig = Rig::new().await;
    // Another run of this test may be active in parallel.
    let sleep = format!("sleep 8400.{}", std::process::id());
    for _ in 0..RUNNING_MAX + 6 {
        assert_eq!(rig.run(shell(&format!("{sleep} & true"))).await.code(), 0);
    }
    rig.end(&sleep).await;
}

#[tokio::test]
async fn oldest_background_writer_over_the_limit_is_cut_off() {
    let (rig, marks) = (Rig::new().await, Marks::new());
    let line = |name: &str| leaves_a_writer(&marks, name) + "true";
    assert_eq!(rig.run(named("first", shell(&line("first")))).await.code(), 0);
    assert_eq!(rig.run(shell(&line("second"))).await.code(), 0);
    let sleep = format!("sleep 8500.{}", std::process::id());
    for _ in 0..RUNNING_MAX - 1 {
        assert_eq!(rig.run(shell(&format!("{sleep} & true"))).await.code(), 0);
    }
    // One too many: the first is killed by its next write.
    let begun = Instant::now();
    while rig.lines().await.iter().any(|(_, line)| line.contains(&marks.path("first"))) {
        assert!(begun.elapsed() < DEADLINE, "the first one writes on");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    marks.until_more("second", 5).await;
    rig.end(&sleep).await;
    std::fs::remove_file(marks.path("go")).expect("removed");
    rig.until_none_holds(&marks.path("go")).await;
}

/// Waits until the output stalls because nobody reads it.
async fn until_it_stands(rig: &Rig, exec_id: &str) {
    let (begun, mut last) = (Instant::now(), 0);
    loop {
        sleep(Duration::from_millis(300)).await;
        let now = rig.info(exec_id).await.stdout_bytes;
        if now > 0 && now == last {
            return;
        }
        last = now;
        assert!(begun.elapsed() < DEADLINE, "{now} bytes and more");
    }
}

#[tokio::test]
async fn killed_command_without_a_reader_ends_at_once() {
    let rig = Rig::new().await;
    for (name, tty) in [("pipes", None), ("terminal", TTY)] {
        let order = Order { tty, ..named(name, argv(&["yes", name])) };
        let (_, _input, outputs) = rig.start(order).await.expect("it starts");
        until_it_stands(&rig, name).await;
        let begun = Instant::now();
        let kill = Control::Signal(9);
        rig.execs.control(&SandboxRef::Id(id(1)), name.to_owned(), kill).await.expect("killed");
        while rig.info(name).await.exit.is_none() {
            assert!(begun.elapsed() < DEADLINE, "{name} is still running");
            sleep(Duration::from_millis(20)).await;
        }
        // An attached caller gets all of the output, and the end.
        let wrote = rig.info(name).await.stdout_bytes;
        let ran = drain(outputs).await;
        let end = ran.end.expect("an exit");
        assert_eq!((end.signal, ran.stdout.len() as u64), (9, wrote), "{name}");
    }
    // So does a command that reaches its timeout.
    let order =
        Order { timeout: Some(Duration::from_secs(2)), ..named("late", argv(&["yes", "late"])) };
    let (_, _input, outputs) = rig.start(order).await.expect("it starts");
    let begun = Instant::now();
    while rig.info("late").await.exit.is_none() {
        assert!(begun.elapsed() < DEADLINE, "it is still running");
        sleep(Duration::from_millis(20)).await;
    }
    assert!(drain(outputs).await.end.expect("an exit").timed_out);
}

#[tokio::test]
async fn outputs_of_ended_commands_stay_within_the_sandbox_budget() {
    const MIB: u64 = 1024 * 1024;
    let rig = Rig::new().await;
    rig.shims.output_bytes_max.store(2 * MIB, std::sync::atomic::Ordering::Relaxed);
    let writes = |n: u32| named(&format!("n{n}"), shell("head -c 500000 /dev/zero; exit 7"));
    for n in 0..12 {
        assert_eq!(rig.run(writes(n)).await.stdout.len(), 500_000);
        assert!(rig.on_disk() <= 2 * MIB + 700_000, "{n}: {}", rig.on_disk());
    }
    // The oldest outputs were dropped, which their offsets show; their exits are known.
    let (from, ran) = rig.logs("n0").await;
    assert_eq!((from, ran.stdout.len(), ran.code()), (500_000, 0, 7));
    let (from, ran) = rig.logs("n11").await;
    assert_eq!((from, ran.stdout.len(), ran.code()), (0, 500_000, 7));
    // A running command without an attached caller does not fill the disk either.
    let (_, _input, outputs) =
        rig.start(named("yes", shell("yes & yes >&2"))).await.expect("it starts");
    drop(outputs);
    // Its unread output is kept for a while; then the command no longer waits for a reader.
    let (_, _input, mut outputs) = {
        let (input, inputs) = mpsc::channel(4);
        let attach = Attach {
            sandbox: SandboxRef::Id(id(1)),
            exec_id: "yes".into(),
            stdout_offset: 0,
            stderr_offset: 0,
        };
        let (started, outputs) = rig.execs.attach(attach, inputs).await.expect("attached");
        (started, input, outputs)
    };
    let mut read = 0;
    while read < 8 * MIB {
        match timeout(DEADLINE, outputs.recv()).await.expect("in time").expect("more") {
            Ok(Output::Stdout(bytes) | Output::Stderr(bytes)) => read += bytes.len() as u64,
            other => panic!("{other:?}"),
        }
        assert!(rig.on_disk() <= 3 * MIB, "{}", rig.on_disk());
    }
    rig.execs
        .control(&SandboxRef::Id(id(1)), "yes".to_owned(), Control::Signal(9))
        .await
        .expect("killed");
    drain(outputs).await;
}

#[tokio::test]
async fn outputs_of_ended_commands_stay_within_the_node_budget() {
    let rig = Rig::new().await;
    for n in 0..4 {
        let order = named(&format!("n{n}"), shell("head -c 500000 /dev/zero; exit 7"));
        assert_eq!(rig.run(order).await.code(), 7);
    }
    assert!(rig.on_disk() >= 2_000_000);
    let budget = outputs::Budget { node: 1_200_000, sandbox: 64 << 20 };
    let mut answers = Default::default();
    let limit = outputs::look(&*rig.shims, budget, budget.sandbox, &mut answers).await;
    assert_eq!(limit, budget.sandbox);
    assert!(rig.on_disk() <= 1_200_000, "{}", rig.on_disk());
    let begins: Vec<_> =
        [rig.logs("n0").await.0, rig.logs("n1").await.0, rig.logs("n2").await.0].into();
    assert_eq!(begins, [500_000, 500_000, 0], "the oldest first");
}
