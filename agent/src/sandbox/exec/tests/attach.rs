//! Commands that outlive their callers, their agents, and their helpers.

use super::*;

pub(super) fn named(exec_id: &str, order: Order) -> Order {
    Order { exec_id: Some(exec_id.to_owned()), ..order }
}

fn attach(exec_id: &str, stdout_offset: u64) -> Attach {
    let exec_id = exec_id.to_owned();
    Attach { sandbox: SandboxRef::Id(id(1)), exec_id, stdout_offset, stderr_offset: 0 }
}

impl Rig {
    async fn attach(&self, exec_id: &str, from: u64) -> (Started, mpsc::Sender<Input>, Outputs) {
        let (input, inputs) = mpsc::channel(4);
        let (started, outputs) =
            self.execs.attach(attach(exec_id, from), inputs).await.expect("attached");
        (started, input, outputs)
    }
}

#[tokio::test]
async fn command_of_a_stopped_agent_is_attached_by_the_next_agent() {
    let rig = Rig::new().await;
    let line = "echo one; read x; echo $x; exit 6";
    let (started, input, mut outputs) = rig.start(shell(line)).await.expect("it starts");
    let first = timeout(DEADLINE, outputs.recv()).await.expect("in time").expect("output");
    assert_eq!(first, Ok(Output::Stdout(Bytes::from_static(b"one\n"))));
    let stopping = tokio::spawn({
        let tasks = rig.tasks.clone();
        async move { tasks.finish().await }
    });
    let error = drain(outputs).await.end.expect_err("the agent stops");
    assert_eq!(error.reason, Reason::ShuttingDown);
    timeout(DEADLINE, stopping).await.expect("in time").expect("no panic");
    drop(input);
    // Another agent finds the same shim.
    let next = Rig::over(Arc::clone(&rig.shims)).await;
    let (again, input, outputs) = next.attach(&started.exec_id, 4).await;
    assert_eq!((again.stdout_offset, again.stdin_offset), (4, 0));
    input.send(Input::Stdin(Bytes::from_static(b"two\n"))).await.expect("taken");
    let ran = drain(outputs).await;
    assert_eq!((ran.out(), ran.code()), ("two\n", 6));
}

#[tokio::test]
async fn command_with_an_exec_id_runs_once_and_outlives_its_caller() {
    let rig = Rig::new().await;
    let mark = tempfile::NamedTempFile::new().expect("a file");
    let line = format!("echo ran >>{}; read x; echo got $x", mark.path().display());
    let order = || named("build-1", shell(&line));
    let (_, _input, outputs) = rig.start(order()).await.expect("it starts");
    drop(outputs);
    // A repeated request is the same run, also for two in parallel.
    let (first, second) = tokio::join!(rig.start(order()), rig.start(order()));
    let (_, input, outputs) = first.expect("attached");
    drop(second.expect("attached"));
    input.send(Input::Stdin(Bytes::from_static(b"it\n"))).await.expect("taken");
    assert_eq!(drain(outputs).await.out(), "got it\n");
    // And after it has ended.
    let ran = rig.run(order()).await;
    assert_eq!((ran.out(), ran.code()), ("got it\n", 0));
    let error = rig.start(named("build-1", shell("true"))).await.expect_err("another");
    assert_eq!(error.reason, Reason::ExecIdReused);
    // A shim that replaces a killed one knows no exit any more; it does not run the command again.
    rig.shims.serving.lock().expect("no panic").drain(..).for_each(|shim| shim.abort());
    let begun = Instant::now();
    let error = loop {
        match rig.start(order()).await {
            // The socket of an aborted task closes a little later.
            Err(error) if error.reason == Reason::OutcomeUnknown => {
                assert!(begun.elapsed() < DEADLINE, "{error}");
                sleep(Duration::from_millis(10)).await;
            }
            other => break other.expect_err("lost"),
        }
    };
    assert_eq!(error.reason, Reason::ExecLost);
    let text = std::fs::read_to_string(mark.path()).expect("read");
    assert_eq!(text, "ran\n", "it ran once");
    let (_, inputs) = mpsc::channel(1);
    let error = rig.execs.attach(attach("build-2", 0), inputs).await.expect_err("never was");
    assert_eq!(error.reason, Reason::ExecNotFound);
}

/// Waits until an unread run has written more than is kept.
async fn until_it_runs_free(rig: &Rig, exec_id: &str) {
    let begun = Instant::now();
    loop {
        let runs = rig.execs.list(&SandboxRef::Id(id(1))).await.expect("listed");
        let run = runs.iter().find(|run| run.exec_id == exec_id).expect("it runs");
        if run.stdout_bytes > 2 * KEPT {
            return;
        }
        assert!(begun.elapsed() < DEADLINE, "it is held: {run:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn detached_command_does_not_wait_for_readers_that_left() {
    let rig = Rig::new().await;
    let order = Order { detached: true, ..named("server", argv(&["yes"])) };
    let (_, _input, outputs) = rig.start(order).await.expect("it starts");
    drop(outputs);
    until_it_runs_free(&rig, "server").await;
    // Nor for a reader that came later, read a little, and left.
    let (started, _input, mut outputs) = rig.attach("server", 0).await;
    assert!(started.stdout_offset > 0, "the oldest was let go");
    assert!(matches!(timeout(DEADLINE, outputs.recv()).await, Ok(Some(Ok(Output::Stdout(_))))));
    drop(outputs);
    let before = started.stdout_offset;
    let begun = Instant::now();
    loop {
        let (again, _input, _outputs) = rig.attach("server", 0).await;
        if again.stdout_offset > before + 2 * KEPT {
            break;
        }
        assert!(begun.elapsed() < DEADLINE, "it is held");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn repeated_attaches_lose_and_duplicate_no_output() {
    let rig = Rig::new().await;
    let line = "seq 3000000; read x; echo $x >&2; exit 9";
    let (_, _input, outputs) = rig.start(named("long", shell(line))).await.expect("it starts");
    drop(outputs);
    let wanted: String = (1..=3_000_000).map(|n| format!("{n}\n")).collect();
    let mut got = Vec::new();
    for life in 1..=100 {
        let (started, _input, mut outputs) = rig.attach("long", got.len() as u64).await;
        assert_eq!(started.stdout_offset, got.len() as u64, "life {life}");
        for _ in 0..life % 7 {
            match timeout(DEADLINE, outputs.recv()).await.expect("in time") {
                Some(Ok(Output::Stdout(bytes))) => got.extend(bytes),
                other => panic!("{other:?}"),
            }
        }
    }
    let (started, input, outputs) = rig.attach("long", got.len() as u64).await;
    assert_eq!(started.stdin_offset, 0);
    input.send(Input::Stdin(Bytes::from_static(b"end\n"))).await.expect("taken");
    let ran = drain(outputs).await;
    got.extend(&ran.stdout);
    assert!(got == wanted.as_bytes(), "{} bytes, not {}", got.len(), wanted.len());
    assert_eq!((ran.stderr.as_slice(), ran.code()), (&b"end\n"[..], 9));
}

#[tokio::test]
async fn repeated_stdin_is_accepted_once_by_its_offset() {
    let rig = Rig::new().await;
    let (_, _input, outputs) = rig.start(named("cat", argv(&["cat"]))).await.expect("it starts");
    let name = SandboxRef::Id(id(1));
    let write = |offset, data: &'static str, eof| {
        let data = Bytes::from_static(data.as_bytes());
        rig.execs.control(&name, "cat".to_owned(), Control::Stdin { offset, data, eof })
    };
    assert_eq!(write(0, "abc", false).await, Ok(3));
    assert_eq!(write(0, "abc", false).await, Ok(3), "known");
    assert_eq!(write(1, "bcdef", false).await, Ok(6), "known in part");
    assert_eq!(write(9, "x", false).await.expect_err("a gap").reason, Reason::FieldInvalid);
    let listed = rig.execs.list(&name).await.expect("listed");
    assert_eq!((listed.len(), &*listed[0].exec_id, &*listed[0].command), (1, "cat", "cat"));
    assert_eq!((listed[0].attached, listed[0].exit), (1, None));
    assert_eq!(write(6, "g", true).await, Ok(7));
    let ran = drain(outputs).await;
    assert_eq!((ran.out(), ran.code()), ("abcdefg", 0));
    let listed = rig.execs.list(&name).await.expect("listed");
    assert_eq!((listed[0].exit.map(|exit| exit.code), listed[0].stdout_bytes), (Some(0), 7));
}

#[tokio::test]
async fn command_timeout_does_not_advance_while_frozen() {
    let rig = Rig::new().await;
    let order =
        Order { timeout: Some(Duration::from_secs(1)), ..named("t", argv(&["sleep", "7900"])) };
    let (_, _input, mut outputs) = rig.start(order).await.expect("it starts");
    rig.pve.frozen.store(true, std::sync::atomic::Ordering::Relaxed);
    let early = timeout(Duration::from_millis(2500), outputs.recv()).await;
    assert!(early.is_err(), "{early:?}");
    rig.pve.frozen.store(false, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(drain(outputs).await.code(), 124);
}

#[tokio::test]
async fn killed_helper_is_replaced_and_its_commands_are_lost() {
    let rig = Rig::new().await;
    assert_eq!(rig.run(argv(&["true"])).await.code(), 0);
    let (_, _input, outputs) = rig.start(argv(&["sleep", "8000"])).await.expect("it starts");
    rig.until_count("sleep 8000", 1).await;
    rig.signal_helpers(9);
    let error = drain(outputs).await.end.expect_err("lost");
    assert_eq!(error.reason, Reason::ExecLost);
    rig.until_count("sleep 8000", 0).await;
    assert_eq!(rig.run(argv(&["true"])).await.code(), 0);
}

#[tokio::test]
async fn command_without_a_caller_is_in_use_only_while_it_is_active() {
    let rig = Rig::new().await;
    let name = SandboxRef::Id(id(1));
    assert_eq!(rig.execs.inactive(&name).await.expect("listed"), None, "nothing runs");
    let detached = |name, order| Order { detached: true, ..named(name, order) };
    let waits = detached("waits", argv(&["sleep", "8600"]));
    let works = detached("works", shell("while :; do :; done"));
    for order in [waits, works] {
        drop(rig.start(order).await.expect("it starts"));
    }
    let inactive = async |exec_id| {
        let list = rig.execs.list(&name).await.expect("listed");
        let exec = list.into_iter().find(|exec| exec.exec_id == exec_id).expect("listed");
        duration::read(exec.inactive.expect("it runs")).expect("not negative")
    };
    // The shim looks at what they use every 5 s.
    let enough = Duration::from_secs(12);
    let begun = Instant::now();
    while inactive("waits").await < enough {
        assert!(begun.elapsed() < DEADLINE, "a command that waits counts as active");
        sleep(Duration::from_millis(100)).await;
    }
    let works = inactive("works").await;
    assert!(works < enough, "{works:?}");
    let last = rig.execs.inactive(&name).await.expect("listed").expect("two run");
    assert!(last < enough, "the active one counts: {last:?}");
    for exec_id in ["waits", "works"] {
        let kill = Control::Signal(9);
        rig.execs.control(&name, exec_id.to_owned(), kill).await.expect("killed");
    }
    rig.until_no_place_is_taken().await;
}
