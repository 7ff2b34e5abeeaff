//! Sandbox whose root does all it can against whoever enters it.

use super::*;

/// Builds a Bash script that sends the shim whatever a helper could send.
fn says(messages: &[&str]) -> String {
    let said = messages.iter().map(|message| {
        if message.is_empty() {
            // Waits for a request.
            "head -c 1 <&3 >/dev/null; ".to_owned()
        } else {
            format!("printf '%s' '{message}' >&3; ")
        }
    });
    said.chain(["sleep 60".to_owned()]).collect()
}

async fn lies(messages: &[&str], order: Order) -> Error {
    let rig = Rig::new().await;
    *rig.pve.lie.lock().expect("no panic") = Some(says(messages));
    match rig.start(order).await {
        Err(error) => error,
        Ok((_, _input, outputs)) => drain(outputs).await.end.expect_err("nothing ran"),
    }
}

#[tokio::test]
async fn malformed_helper_message_fails_the_command() {
    let long = "x".repeat(8000);
    for nonsense in ["junk", "{}", "{\"Exited\":{\"token\":0,\"code\":999,\"signal\":0}}", &long] {
        let error = lies(&[nonsense], argv(&["true"])).await;
        assert_eq!(error.reason, Reason::ExecFailed, "{nonsense:.60}: {error}");
        // The helper had the order by then.
        let error = lies(&["\"Ready\"", "", nonsense], argv(&["true"])).await;
        assert_eq!(error.reason, Reason::ExecLost, "{nonsense:.60}: {error}");
    }
    // Exits of commands that nobody requested are ignored.
    let strangers = ["\"Ready\"", "{\"Exited\":{\"token\":7,\"code\":0,\"signal\":0}}", "", "bye"];
    assert_eq!(lies(&strangers, argv(&["true"])).await.reason, Reason::ExecLost);
    // The helper reports a start and is gone: the end was not seen.
    let gone = ["\"Ready\"", "", "{\"Spawned\":{\"token\":0}}", "junk"];
    assert_eq!(lies(&gone, argv(&["true"])).await.reason, Reason::ExecLost);
}

#[tokio::test]
async fn malformed_message_about_one_command_ends_only_that_command() {
    let rig = Rig::new().await;
    let spawned = "{\"Spawned\":{\"token\":0}}";
    let nonsense = [
        "{\"Exited\":{\"token\":1,\"code\":999,\"signal\":0}}",
        "{\"Spawned\":{\"token\":2,\"more\":[]},\"Ready\":{\"token\":2}}",
        "{\"Refused\":{\"token\":3,\"why\":\"NoSuchReason\"}}",
    ];
    let end = "{\"Exited\":{\"token\":0,\"code\":5,\"signal\":0}}";
    let said =
        ["\"Ready\"", "", spawned, "", nonsense[0], "", nonsense[1], "", nonsense[2], "", end];
    *rig.pve.lie.lock().expect("no panic") = Some(says(&said));
    let (_, _input, outputs) = rig.start(argv(&["true"])).await.expect("it starts");
    for number in 1..=3 {
        let error = rig.start(argv(&["true"])).await.expect_err("nonsense");
        assert_eq!(error.reason, Reason::ExecLost, "{number}: {error}");
    }
    let fourth = tokio::spawn(async move { (rig.start(argv(&["true"])).await.map(drop), rig) });
    assert_eq!(drain(outputs).await.code(), 5, "the first has not suffered");
    fourth.abort();
}

#[tokio::test]
async fn the_helpers_image_cannot_be_overwritten() {
    let rig = Rig::new().await;
    // As CVE-2019-5736: through the exe link of whatever came in from outside.
    let line = "for exe in /proc/[0-9]*/exe; do case $(readlink $exe) in /memfd:pve-sandbox-helper*) \
                (echo overwritten >$exe) 2>/dev/null && echo wrote; (: >>$exe) 2>/dev/null && \
                (echo x >>$exe) 2>/dev/null && echo appended; echo seen;; esac; done";
    let ran = rig.run(shell(line)).await;
    assert!(ran.out().contains("seen"), "no helper was found: {}", ran.out());
    assert!(!ran.out().contains("wrote") && !ran.out().contains("appended"), "{}", ran.out());
    assert_eq!(rig.run(argv(&["true"])).await.code(), 0);
}

#[tokio::test]
async fn command_has_only_its_three_descriptors() {
    let rig = Rig::new().await;
    for tty in [None, Some(Window { rows: 24, columns: 80 })] {
        let mut order = shell("ls -l /proc/self/fd | sed 1d; echo cwd=$(readlink /proc/self/cwd)");
        order.tty = tty;
        let ran = rig.run(order).await;
        let open = ran.out().lines().filter(|line| line.contains(" -> ")).count();
        assert_eq!(open, 4, "three, and the directory itself: {}", ran.out());
        for host in ["socket:", "memfd:", "signalfd", "/root/src", "cgroup"] {
            assert!(!ran.out().contains(host), "{host}: {}", ran.out());
        }
    }
}

#[tokio::test]
async fn flooding_or_forking_command_is_ended_by_its_timeout() {
    let rig = Rig::new().await;
    let mut order = shell("yes >&2 & yes");
    order.timeout = Some(Duration::from_millis(700));
    let (_, _input, mut outputs) = rig.start(order).await.expect("it starts");
    // Reads only now and then.
    let mut bytes = 0;
    let end = loop {
        match timeout(DEADLINE, outputs.recv()).await.expect("in time").expect("an end") {
            Ok(Output::Stdout(more) | Output::Stderr(more)) => bytes += more.len(),
            Ok(Output::Exit(exit)) => break exit,
            Err(error) => panic!("{error}"),
        }
    };
    assert!(end.timed_out && bytes > 0);
    // A small fork bomb: its processes carry its mark, whichever process adopts them.
    let bomb =
        "f() { sleep 8100 & [ $1 -gt 0 ] && { f $(($1-1)) & f $(($1-1)) & }; }; f 6; sleep 8100";
    let mut order = shell(bomb);
    order.timeout = Some(Duration::from_millis(900));
    let ran = rig.run(order).await;
    assert_eq!(ran.code(), 124);
    rig.until_count("sleep 8100", 0).await;
}
