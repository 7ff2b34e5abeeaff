//! Many short commands next to a long one, and events that must not end the helper they all share.

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use super::*;

/// Callers in parallel: with the long command, as many as a shim runs.
const CALLERS: usize = RUNNING_MAX - 1;
/// Calls of each caller.
const CALLS: usize = 24;

/// Makes one short call, a command or a file operation: each is one child inside.
async fn short_call(rig: &Rig, number: usize) -> Result<(), Error> {
    let name = SandboxRef::Id(id(1));
    let root = User::Id(0);
    match number % 5 {
        0 => {
            let ran = rig.run(argv(&["true"])).await;
            assert_eq!((ran.end?.code, ran.stdout.len()), (0, 0));
        }
        1 => {
            let ran = rig.run(argv(&["/nosuch"])).await;
            assert_eq!(ran.end?.code, 127);
        }
        2 => {
            let entry = rig.execs.files(&name, &root).stat("/etc/passwd".to_owned()).await?;
            assert_eq!(entry.name, "passwd");
        }
        3 => {
            let path = "/etc/hostname".to_owned();
            let (entry, mut flow) = rig.execs.files(&name, &root).read(path, (0, 0)).await?;
            let mut read = 0;
            while let Some(bytes) = flow.recv().await {
                read += bytes?.len() as u64;
            }
            assert_eq!(read, entry.size);
        }
        _ => {
            let all = (5000, String::new());
            let (entries, _) = rig.execs.files(&name, &root).list("/".to_owned(), all).await?;
            assert!(entries.iter().any(|entry| entry.name == "etc"));
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn helper_survives_many_short_commands() {
    let rig = Arc::new(Rig::new().await);
    let (_, input, outputs) = rig.start(shell("read x; exit 9")).await.expect("it starts");
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..CALLERS {
        let rig = Arc::clone(&rig);
        callers.spawn(async move {
            for call in 0..CALLS {
                let done = short_call(&rig, caller + call).await;
                done.unwrap_or_else(|error| panic!("call {call} of caller {caller}: {error}"));
            }
        });
    }
    while let Some(done) = callers.join_next().await {
        done.expect("every call is answered");
    }
    input.send(Input::Stdin(Bytes::from_static(b"end\n"))).await.expect("taken");
    assert_eq!(drain(outputs).await.code(), 9, "the long one has run through it all");
}

#[tokio::test]
async fn command_ended_by_a_real_time_signal_is_reported() {
    let rig = Rig::new().await;
    for signal in [34, 50, 64] {
        let ran = rig.run(shell(&format!("kill -{signal} $$"))).await;
        assert_eq!(ran.end, Ok(Exit { code: 128 + signal, signal, timed_out: false }));
    }
}

#[tokio::test]
async fn helper_without_cap_sys_admin_runs_and_kills_commands() {
    let rig = Rig::new().await;
    let script = r#"exec setpriv --bounding-set=-sys_admin "$0""#;
    *rig.pve.lie.lock().expect("no panic") = Some(script.to_owned());
    let (_, input, outputs) = rig.start(shell("read x; exit 9")).await.expect("it starts");
    for code in [0, 3] {
        assert_eq!(rig.run(shell(&format!("exit {code}"))).await.code(), code);
    }
    // A forced end finds the command by its mark, and does not take the helper for it.
    let time = format!("8200.{}", std::process::id());
    let (_, _input, hung_up) = rig.start(argv(&["sleep", &time])).await.expect("it starts");
    rig.until_count(&format!("sleep {time}"), 1).await;
    drop(hung_up);
    rig.until_none_holds(&time).await;
    input.send(Input::Stdin(Bytes::from_static(b"end\n"))).await.expect("taken");
    assert_eq!(drain(outputs).await.code(), 9);
}

#[tokio::test]
async fn helper_without_free_descriptors_refuses_commands_and_survives() {
    let rig = Rig::new().await;
    let (_, input, outputs) = rig.start(shell("read x; exit 9")).await.expect("it starts");
    let [helper] = rig.helpers()[..] else { panic!("one helper: {:?}", rig.helpers()) };
    let limit = |number| {
        let pid = Pid::from_raw(i32::try_from(helper).expect("a pid")).expect("a pid");
        let limit = Rlimit { current: Some(number), maximum: Some(4096) };
        prlimit(Some(pid), Resource::Nofile, limit).expect("a limit");
    };
    // No descriptor at all, some of the order's, and all of these but none for the helper's pipes.
    for number in [4, 7, 9] {
        limit(number);
        let error = rig.start(argv(&["true"])).await.expect_err("no descriptors");
        assert_eq!(error.reason, Reason::ExecFailed, "{number}: {error}");
    }
    limit(1024);
    assert_eq!(rig.run(argv(&["true"])).await.code(), 0);
    input.send(Input::Stdin(Bytes::from_static(b"end\n"))).await.expect("taken");
    assert_eq!(drain(outputs).await.code(), 9);
}
