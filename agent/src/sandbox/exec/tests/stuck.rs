//! Helpers that are stalled.

use super::*;
use crate::sys::pidfd;

const SIGSTOP: i32 = nix::libc::SIGSTOP;

#[tokio::test]
async fn stopped_helper_is_continued_and_loses_nothing() {
    let rig = Rig::new().await;
    let (_, input, outputs) = rig.start(shell("read x; exit 9")).await.expect("it starts");
    let [helper] = rig.helpers()[..] else { panic!("one helper: {:?}", rig.helpers()) };
    for code in [3, 4] {
        pidfd::signal(helper, SIGSTOP, || true).expect("stopped");
        assert_eq!(rig.run(shell(&format!("exit {code}"))).await.code(), code);
    }
    // A helper that was stopped when a command ended still reports the end.
    pidfd::signal(helper, SIGSTOP, || true).expect("stopped");
    input.send(Input::Stdin(Bytes::from_static(b"end\n"))).await.expect("taken");
    assert_eq!(drain(outputs).await.code(), 9);
    assert_eq!(rig.helpers(), [helper], "the same one");
}

#[tokio::test]
async fn unresponsive_helper_is_replaced_and_its_commands_are_lost() {
    let rig = Rig::new().await;
    // Reports the start of one command, and never says anything again.
    let script = r#"printf '"Ready"' >&3; head -c 1 <&3 >/dev/null
        printf '{"Spawned":{"token":0}}' >&3; exec sleep TIME"#;
    let time = format!("8400.{}", std::process::id());
    *rig.pve.lie.lock().expect("no panic") = Some(script.replace("TIME", &time));
    let (_, _input, mut outputs) = rig.start(argv(&["true"])).await.expect("it starts");
    *rig.pve.lie.lock().expect("no panic") = None;
    rig.until_count(&format!("sleep {time}"), 1).await;
    // Waits as long as a helper under heavy load needs.
    let end = timeout(4 * DEADLINE, outputs.recv()).await.expect("in time").expect("an end");
    let error = end.expect_err("nobody saw its end");
    assert_eq!(error.reason, Reason::ExecLost, "{error}");
    assert!(error.message.contains("did not answer"), "{error}");
    assert_eq!(rig.count(&format!("sleep {time}")).await, 0, "it is dead");
    assert_eq!(rig.run(argv(&["true"])).await.code(), 0, "another one has taken its place");
}
