//! Tests of what protects people: the question before a deletion, lists that fit a terminal, and a
//! controller that has too much to do.

use std::sync::atomic::Ordering;

use tokio::net::{TcpListener, TcpStream};

use crate::{
    fake::{Behaviour, Fake, ID, finish},
    terminal::Terminal,
};

async fn fake() -> Fake {
    Fake::start(Behaviour { snapshots: vec!["small"], ..Behaviour::default() }).await
}

/// Runs the program on a terminal of 80 columns; types `answer` once `wanted` is shown. Returns the
/// exit code and what was shown.
async fn on_terminal(fake: &Fake, args: &[&str], wanted: &str, answer: &str) -> (i32, String) {
    let mut terminal = Terminal::start(fake, args, 80);
    if !wanted.is_empty() {
        terminal.until(wanted).await.press(answer).await;
    }
    terminal.end().await
}

#[tokio::test]
async fn rm_asks_on_a_terminal_and_deletes_what_is_meant() {
    let fake = fake().await;
    let deletes = || fake.behaviour.deletes.load(Ordering::SeqCst);
    let (code, seen) = on_terminal(&fake, &["rm", ID], "[y/N]", "n\n").await;
    assert_eq!((code, deletes()), (1, 0), "{seen}");
    assert!(seen.contains("is running. Delete it for good?"), "{seen}");
    assert!(seen.contains("nothing was deleted"), "{seen}");
    let (code, seen) = on_terminal(&fake, &["rm", ID], "[y/N]", "y\n").await;
    assert_eq!((code, deletes()), (0, 1), "{seen}");
    let (code, seen) = on_terminal(&fake, &["rm", ID, "100001"], "[y/N]", "yes\n").await;
    assert_eq!((code, deletes()), (0, 3), "{seen}");
    assert!(seen.contains("PHASE") && seen.contains("Delete these 2 sandboxes"), "{seen}");
    let (code, seen) = on_terminal(&fake, &["rm", "-f", ID], "", "").await;
    assert_eq!((code, deletes(), seen.contains("[y/N]")), (0, 4, false), "{seen}");
    let ran = fake.run(&["rm", ID]).await;
    assert_eq!((ran.code, deletes()), (Some(0), 5), "no terminal, no question: {ran:?}");
}

#[tokio::test]
async fn lists_fit_a_terminal_and_show_short_ids() {
    let fake = fake().await;
    for verb in
        [&["ls"][..], &["node", "ls"], &["explain", ID], &["events", ID], &["top", "--once"]]
    {
        let (code, seen) = on_terminal(&fake, verb, "", "").await;
        assert_eq!(code, 0, "{verb:?}: {seen}");
        for line in seen.lines() {
            let plain = line.replace("\x1b[0m", "").replace("\x1b[1m", "").replace("\x1b[32m", "");
            assert!(plain.chars().count() <= 100, "{verb:?}: {plain}");
        }
        let is_list = verb[0] != "node" && verb[0] != "explain";
        assert!(!is_list || seen.contains("084sn02q") && !seen.contains(ID), "{verb:?}: {seen}");
    }
    let (_, wide) = on_terminal(&fake, &["ls", "-o", "wide"], "", "").await;
    assert!(wide.contains(ID), "{wide}");
    assert_eq!(fake.run(&["stop", "084sn02q"]).await.text(), format!("{ID} stopped\n"));
}

#[tokio::test]
async fn debug_shows_each_call_and_no_token() {
    let fake = fake().await;
    let ran = fake.run(&["--debug", "ls", "-q"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let lines: Vec<_> = ran.stderr.lines().collect();
    assert_eq!(lines[0], format!("debug: the controller is localhost:{}", fake.port));
    assert_eq!(lines.len(), 3, "two pages: {ran:?}");
    for line in &lines[1..] {
        let words: Vec<_> = line.split(' ').collect();
        assert_eq!(words[1], "sandbox.v1.SandboxService/ListSandboxes", "{line}");
        assert!(words[2].parse::<f64>().is_ok_and(|ms| ms > 0.0), "{line}");
        assert_eq!(words[3..], ["ms", "OK"], "{line}");
    }
    let refused = fake.run(&["get", "--debug", "100002"]).await;
    assert!(refused.stderr.contains("/GetSandbox ") && refused.stderr.contains(" ms NOT_FOUND\n"));
    let exec = fake.run(&["--debug", "exec", ID, "exit", "3"]).await;
    assert!(exec.code == Some(3) && exec.stderr.contains("/Exec "), "{exec:?}");
    let mut nowhere = fake.command(&["--debug", "ls"]);
    let nowhere = nowhere.env("SANDBOXCTL_ENDPOINT", "https://localhost:1").spawn().expect("spawn");
    let nowhere = finish(nowhere).await;
    assert!(nowhere.stderr.contains(" ms UNAVAILABLE\n"), "{nowhere:?}");
    for ran in [ran, refused, exec, nowhere] {
        assert!(!ran.stderr.contains("t0ken"), "{ran:?}");
    }
}

/// Passes connections on to the fake, but for the first ones, which it closes before TLS.
async fn flaky(fake: &Fake, closes: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let endpoint = format!("https://localhost:{}", listener.local_addr().expect("bound").port());
    let port = fake.port;
    tokio::spawn(async move {
        for number in 0.. {
            let Ok((mut from, _)) = listener.accept().await else { return };
            if number < closes {
                continue;
            }
            tokio::spawn(async move {
                let mut to = TcpStream::connect(("127.0.0.1", port)).await.expect("the fake");
                tokio::io::copy_bidirectional(&mut from, &mut to).await.ok();
            });
        }
    });
    endpoint
}

#[tokio::test]
async fn overloaded_controller_is_asked_again() {
    let fake = fake().await;
    for verb in [
        &["ls"][..],
        &["get", ID],
        &["create"],
        &["stop", ID],
        &["nodes"],
        &["exec", ID, "exit", "0"],
    ] {
        let endpoint = flaky(&fake, 2).await;
        let mut command = fake.command(verb);
        let ran =
            finish(command.env("SANDBOXCTL_ENDPOINT", endpoint).spawn().expect("spawn")).await;
        assert_eq!(ran.code, Some(0), "{verb:?} {ran:?}");
    }
    let endpoint = flaky(&fake, usize::MAX).await;
    let mut command = fake.command(&["create", "--wait", "2s", "--snapshot", "small"]);
    let ran = finish(command.env("SANDBOXCTL_ENDPOINT", endpoint).spawn().expect("spawn")).await;
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert!(!ran.stderr.contains("SANDBOXCTL_CA"), "{ran:?}");
    assert!(ran.stderr.contains("does not keep up"), "{ran:?}");
}
