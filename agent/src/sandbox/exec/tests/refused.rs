//! A refusal leaves nothing behind: not even its exec_id is used up.

use super::{attach::named, *};

/// Restarts the agent and kills its shim: the next shim reads the names from the disk.
async fn restart(rig: Rig) -> Rig {
    rig.shims.serving.lock().expect("no panic").drain(..).for_each(|shim| shim.abort());
    let shims = Arc::clone(&rig.shims);
    drop(rig);
    Rig::over(shims).await
}

/// Runs an order once the killed shim is certainly gone.
async fn run(rig: &Rig, order: Order) -> Ran {
    let begun = Instant::now();
    loop {
        match rig.start(order.clone()).await {
            Ok((_, _input, outputs)) => return drain(outputs).await,
            // The socket of an aborted task closes a little later.
            Err(error) if error.reason == Reason::OutcomeUnknown => {
                assert!(begun.elapsed() < DEADLINE, "{error}");
                sleep(Duration::from_millis(10)).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn exec_id_of_a_refused_command_can_be_used_again() {
    let mut rig = Rig::new().await;
    let user = Order { user: User::Name("no-such-user".into()), ..shell("echo ran") };
    let cwd = Order { cwd: Some("/nosuch".into()), ..shell("echo ran") };
    let fine = || shell("echo ran");
    for (name, refused) in [("user", user), ("cwd", cwd)] {
        for _ in 0..2 {
            let error = rig.start(named(name, refused.clone())).await.expect_err("refused");
            assert_eq!((error.reason, error.message.contains(name)), (Reason::FieldInvalid, true));
        }
        // Also for two requests in parallel.
        let (one, two) = tokio::join!(
            rig.start(named(name, refused.clone())),
            rig.start(named(name, refused.clone())),
        );
        for error in [one.expect_err("refused"), two.expect_err("refused")] {
            assert_eq!(error.reason, Reason::FieldInvalid, "{error}");
        }
        let (rest, kept) = (format!("{name}-2"), format!("{name}-3"));
        assert_eq!(rig.run(named(name, fine())).await.out(), "ran\n");
        rig.start(named(&rest, refused.clone())).await.expect_err("refused");
        rig.run(named(&kept, fine())).await;
        // Also over a restart; and a name that has run stays used up.
        rig = restart(rig).await;
        assert_eq!(run(&rig, named(&rest, fine())).await.out(), "ran\n");
        let error = rig.start(named(&kept, fine())).await.expect_err("lost");
        assert_eq!(error.reason, Reason::ExecLost);
    }
}

#[tokio::test]
async fn exec_id_of_an_unrunnable_program_can_be_used_again() {
    let rig = Rig::new().await;
    let dir = tempfile::tempdir().expect("tempdir");
    let script = dir.path().join("script");
    std::fs::write(&script, "#!/bin/sh\necho ran\n").expect("written");
    let path = script.to_str().expect("UTF-8");
    let order = || named("script", argv(&[path]));
    // Its exit can be read as often as somebody asks.
    for _ in 0..2 {
        assert_eq!(rig.run(order()).await.code(), 126);
    }
    let runnable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, runnable).expect("made runnable");
    assert_eq!(rig.run(order()).await.out(), "ran\n");
    // Now it has run: once.
    std::fs::write(&script, "#!/bin/sh\necho twice\n").expect("written");
    assert_eq!(rig.run(order()).await.out(), "ran\n");

    assert_eq!(rig.run(named("missing", argv(&["no-such-program"]))).await.code(), 127);
    assert_eq!(rig.run(named("missing", shell("exit 127"))).await.code(), 127);
    // A program that exits with the same code has run.
    let error = rig.start(named("missing", argv(&["true"]))).await.expect_err("another");
    assert_eq!(error.reason, Reason::ExecIdReused);
    assert_eq!(rig.run(named("restarted", argv(&["no-such-program"]))).await.code(), 127);
    let rig = restart(rig).await;
    assert_eq!(run(&rig, named("restarted", shell("echo ran"))).await.out(), "ran\n");
}

#[tokio::test]
async fn exec_id_refused_over_the_running_limit_can_be_used_again() {
    let rig = Rig::new().await;
    let mut held = Vec::new();
    let time = format!("8300.{}", std::process::id());
    for _ in 0..RUNNING_MAX {
        held.push(rig.start(argv(&["sleep", &time])).await.expect("it starts"));
    }
    let order = || named("late", shell("echo ran"));
    let error = rig.start(order()).await.expect_err("one too many");
    assert_eq!(error.reason, Reason::TooManyCalls);
    drop(held);
    rig.until_count(&format!("sleep {time}"), 0).await;
    let begun = Instant::now();
    let ran = loop {
        match rig.start(order()).await {
            Ok((_, _input, outputs)) => break drain(outputs).await,
            Err(error) => assert_eq!(error.reason, Reason::TooManyCalls, "{error}"),
        }
        assert!(begun.elapsed() < DEADLINE, "no place became free");
        sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(ran.out(), "ran\n");
}

#[tokio::test]
async fn exec_id_taken_by_another_shim_is_refused() {
    let rig = Rig::new().await;
    // From now on this shim knows the exec_ids on the disk.
    assert_eq!(rig.run(named("first", argv(&["true"]))).await.code(), 0);
    let ids = rig.shims.dir.path().join("ids");
    let mut file = std::fs::File::options().append(true).open(ids).expect("there");
    std::io::Write::write_all(&mut file, b"\nd1 build\n").expect("written");
    let error = rig.start(named("build", argv(&["true"]))).await.expect_err("another's");
    assert_eq!(error.reason, Reason::ExecIdReused, "{error}");
}

#[tokio::test]
async fn no_command_starts_without_the_environment_of_its_sandbox() {
    let rig = Rig::new().await;
    let (_, input, outputs) = rig.start(named("before", argv(&["cat"]))).await.expect("it starts");
    let lose = |record: &mut Record| (record.env, record.env_lost) = (Default::default(), true);
    rig.sandboxes.records.change(&id(1), lose).await.expect("written");
    let error = rig.start(shell("echo ran")).await.expect_err("refused");
    assert_eq!(error.reason, Reason::EnvLost, "{error}");
    assert!(error.message.contains(&id(1).to_string()), "{error}");
    // What runs goes on, and files can be copied out.
    input.send(Input::Eof).await.expect("taken");
    assert_eq!(drain(outputs).await.code(), 0);
    let sandbox = SandboxRef::Id(id(1));
    rig.execs.files(&sandbox, &User::Id(0)).stat("/etc/passwd".into()).await.expect("a file");
    let (found, _) = rig.sandboxes.check().await;
    let lost = |finding: &&Finding| finding.subject == id(1).to_string();
    let lost: Vec<_> = found.iter().filter(lost).map(|finding| finding.invariant).collect();
    assert!(lost.contains(&Invariant::I6), "{found:?}");
}
