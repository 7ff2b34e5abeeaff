//! Tests of the verbs that do several calls: `run`, `wait` and `inspect`; and of how a call is
//! interrupted.

use std::{
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Child,
    time::{Instant, timeout},
};

use crate::fake::{Behaviour, Fake, ID, finish};

async fn fake() -> Fake {
    Fake::start(Behaviour { snapshots: vec!["small"], ..Behaviour::default() }).await
}

fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(child.id().expect("it runs").cast_signed());
    kill(pid, signal).expect("signalled");
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let came = timeout(Duration::from_secs(20), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    came.await.unwrap_or_else(|_| panic!("{what} did not come"));
}

#[tokio::test]
async fn run_ends_with_the_code_of_the_command_and_removes_its_sandbox() {
    let fake = fake().await;
    let deletes = || fake.behaviour.deletes.load(Ordering::SeqCst);
    let ran = fake.run(&["run", "--", "exit", "7"]).await;
    assert_eq!((ran.code, deletes()), (Some(7), 0), "{ran:?}");
    assert!(ran.stderr.contains(&format!("{ID} runs on node2")), "{ran:?}");
    let ran = fake.run(&["run", "--rm", "both"]).await;
    assert_eq!((ran.code, ran.stderr.as_str(), deletes()), (Some(0), "to stderr\n", 1), "{ran:?}");
    let ran = fake.run(&["run", "--rm", "-e", "A=1", "-u", "ada", "-w", "/srv", "env"]).await;
    assert!(ran.text().contains("/srv ada"), "{ran:?}");
    let ran = fake.run(&["run", "--rm", "refuse"]).await;
    assert_eq!((ran.code, deletes()), (Some(125), 3), "{ran:?}");
    assert_eq!(fake.run(&["run", "--rm"]).await.code, Some(125), "no command");
}

#[tokio::test]
async fn run_removes_the_sandbox_of_a_failed_creation() {
    let behaviour =
        Behaviour { snapshots: vec!["small"], create_fails: true, ..Behaviour::default() };
    let fake = Fake::start(behaviour).await;
    let ran = fake.run(&["run", "--rm", "true"]).await;
    assert_eq!(ran.code, Some(125), "{ran:?}");
    assert!(ran.stderr.contains("start failed"), "{ran:?}");
    assert_eq!(fake.behaviour.deletes.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn interrupted_run_removes_its_sandbox() {
    for (stop, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let behaviour =
            Behaviour { snapshots: vec!["small"], create_hangs: true, ..Behaviour::default() };
        let fake = Fake::start(behaviour).await;
        let child = fake.command(&["run", "--rm", "true"]).spawn().expect("spawn");
        let creates = &fake.behaviour.creates;
        until("the creation", || creates.load(Ordering::SeqCst) > 0).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let since = Instant::now();
        signal(&child, stop);
        let ran = finish(child).await;
        assert_eq!(ran.code, Some(code), "{ran:?}");
        assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
        assert_eq!(fake.behaviour.deletes.load(Ordering::SeqCst), 1, "{ran:?}");
    }
    // While the command runs, the signal is the command's; then the sandbox goes.
    let fake = fake().await;
    let mut child = fake.command(&["run", "--rm", "signal"]).spawn().expect("spawn");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    assert_eq!(lines.next_line().await.expect("a line").as_deref(), Some("ready"));
    signal(&child, Signal::SIGINT);
    assert_eq!(finish(child).await.code, Some(130));
    assert_eq!(fake.behaviour.deletes.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn wait_ends_when_the_sandbox_is_as_wanted() {
    let fake = fake().await;
    for goal in ["running", "port=8000"] {
        let ran = fake.run(&["wait", ID, "--for", goal]).await;
        assert_eq!((ran.code, ran.text()), (Some(0), ""), "{goal}: {ran:?}");
    }
    let ran = fake.run(&["wait", ID, "--for", "port=8001", "--timeout", "1s"]).await;
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert!(ran.stderr.contains("listens on 127.0.0.1:8001 only"), "{ran:?}");
    let ran = fake.run(&["wait", ID, "--for", "stopped", "--timeout", "1s"]).await;
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert_eq!(fake.run(&["wait", ID]).await.code, Some(2), "for what");
    assert_eq!(fake.run(&["wait", "100002", "--for", "running"]).await.code, Some(3));
}

#[tokio::test]
async fn inspect_has_everything_of_a_sandbox() {
    let fake = fake().await;
    let ran = fake.run(&["inspect", "100001"]).await;
    assert!(ran.text().starts_with("{\n  \""), "indented: {ran:?}");
    let value = ran.json();
    assert_eq!(value["id"], ID);
    assert_eq!(value["placement"]["node"], "node2");
    assert_eq!(value["usage"]["pids"], 3);
    assert!(value["execs"].is_array() && value["events"].is_array(), "{value}");
    let list = fake.run(&["inspect", "--json", ID, ID]).await;
    assert_eq!(list.text().lines().count(), 1);
    assert_eq!(list.json().as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn interrupted_create_tells_the_id_and_what_goes_on() {
    let behaviour =
        Behaviour { snapshots: vec!["small"], create_hangs: true, ..Behaviour::default() };
    let fake = Fake::start(behaviour).await;
    for (stop, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let mut create = fake.command(&["create", "--request-id", "r-7"]);
        let mut child = create.spawn().expect("spawn");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let step = lines.next_line().await.expect("a line").expect("a line");
        assert!(step.contains("clone"), "{step}");
        let since = Instant::now();
        signal(&child, stop);
        let ended = timeout(Duration::from_secs(20), child.wait()).await.expect("in time");
        assert_eq!(ended.expect("it ran").code(), Some(code));
        assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
        let told = [lines.next_line().await, lines.next_line().await];
        let told = told.map(|line| line.expect("read").expect("a line")).join("\n");
        assert!(told.contains(&format!("goes on: {ID} on node2: clone")), "{told}");
        assert!(told.contains("sandboxctl wait") && told.contains("--request-id r-7"), "{told}");
    }
}

#[tokio::test]
async fn unknown_outcome_shows_the_request_id() {
    let behaviour = Behaviour {
        snapshots: vec!["small"],
        unknown: AtomicU32::new(u32::MAX),
        ..Behaviour::default()
    };
    let fake = Fake::start(behaviour).await;
    let ran = fake.run(&["create", "--request-id", "r-8", "--wait", "1s"]).await;
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert!(ran.stderr.contains("--request-id r-8"), "{ran:?}");
}

#[tokio::test]
async fn many_creations_are_printed_as_they_come() {
    let fake = fake().await;
    let ran = fake.run(&["create", "--count", "3"]).await;
    assert_eq!((ran.code, ran.text()), (Some(0), format!("{ID}\n").repeat(3).as_str()), "{ran:?}");
}

#[tokio::test]
async fn sigterm_ends_a_call_that_waits_within_a_second() {
    let fake = fake().await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let endpoint = format!("https://localhost:{}", listener.local_addr().expect("bound").port());
    for verb in [&["ls"][..], &["exec", ID, "true"], &["create", "--snapshot", "x"], &["watch", ID]]
    {
        let mut silent = fake.command(verb);
        let silent = silent.env("SANDBOXCTL_ENDPOINT", &endpoint).stdin(Stdio::null());
        let child = silent.spawn().expect("spawn");
        tokio::time::sleep(Duration::from_millis(300)).await;
        let since = Instant::now();
        signal(&child, Signal::SIGTERM);
        let ran = finish(child).await;
        assert!(since.elapsed() < Duration::from_secs(1), "{verb:?} {:?}", since.elapsed());
        assert!(ran.code.is_none_or(|code| code == 143), "{verb:?} {ran:?}");
    }
}

#[tokio::test]
async fn bare_program_shows_its_help() {
    let fake = fake().await;
    let ran = fake.run(&[]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.text().contains("Commands for operators"), "{ran:?}");
    let ran = fake.run(&["template", "ls"]).await;
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("'snapshot'"), "{ran:?}");
    for (short, long) in [(&["nodes"][..], &["node", "ls"][..]), (&["fsck"], &["admin", "fsck"])] {
        assert_eq!(fake.run(short).await.text(), fake.run(long).await.text());
    }
}
