//! Tests of `attach`, `kill` by name, `logs --json` and `console`.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    fake::{Behaviour, Fake, ID, Ran},
    terminal::{CTRL_C, Terminal},
};

async fn fake() -> Fake {
    Fake::start(Behaviour::default()).await
}

/// Starts a command in the background.
async fn detach(fake: &Fake, exec_id: &str, words: &[&str]) {
    let ran = fake.run(&[&["exec", "-d", "--exec-id", exec_id, ID], words].concat()).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
}

fn objects(ran: &Ran) -> Vec<Value> {
    ran.text().lines().map(|line| serde_json::from_str(line).expect("json")).collect()
}

#[tokio::test]
async fn ctrl_c_leaves_a_command_that_is_attached_to() {
    let fake = fake().await;
    detach(&fake, "job", &["signal"]).await;
    let mut terminal = Terminal::start(&fake, &["attach", ID, "job"], 80);
    terminal.until("Ctrl-C leaves it").await.press(CTRL_C).await;
    let (code, seen) = terminal.end().await;
    assert_eq!(code, 130, "{seen}");
    assert!(seen.contains(&format!("`sandboxctl attach {ID} job` comes back")), "{seen}");
    assert!(!seen.contains("ready"), "{seen}");
    let listed = fake.run(&["ps", ID, "--json"]).await.json();
    assert_eq!(listed[0]["state"], "running", "it runs on");
}

#[tokio::test]
async fn ctrl_c_leaves_a_command_on_a_terminal_and_other_keys_are_its_own() {
    let fake = fake().await;
    let mut first = Terminal::start(&fake, &["exec", "-it", "--exec-id", "t", ID, "terminal"], 80);
    first.until("80x24").await;
    let mut second = Terminal::start(&fake, &["attach", ID, "t"], 80);
    second.until("Ctrl-C leaves it").await.press("\x1a").await.until("x1a").await;
    let (code, seen) = {
        second.press(CTRL_C).await;
        second.end().await
    };
    assert_eq!(code, 130, "{seen}");
    first.press("\x04").await;
    assert_eq!(first.end().await.0, 3, "it ran on");
}

#[tokio::test]
async fn attached_command_gets_stdin_and_gives_its_exit_code() {
    let fake = fake().await;
    let start = ["exec", "-i", "--exec-id", "cat", ID, "cat"];
    let mut first = fake.command(&start);
    let first = first.stdin(std::process::Stdio::piped()).spawn().expect("spawn");
    fake.behaviour.sessions.until_started("cat").await;
    let empty = timeout(Duration::from_secs(1), fake.run(&["attach", ID, "cat"])).await;
    assert!(empty.is_err(), "the end of /dev/null is not passed on: {empty:?}");
    let ran = fake.run_with(&["attach", ID, "cat"], b"from a pipe\n").await;
    assert_eq!((ran.code, ran.text()), (Some(0), "from a pipe\n"), "{ran:?}");
    assert_eq!(crate::fake::finish(first).await.text(), "from a pipe\n");
    let ran = fake.run(&["attach", ID, "cat"]).await;
    assert_eq!(ran.code, Some(0));
    assert!(ran.stderr.contains(&format!("it has ended; `sandboxctl logs {ID} cat`")), "{ran:?}");
    assert_eq!(fake.run(&["attach", ID, "none"]).await.code, Some(125));
}

#[tokio::test]
async fn kill_by_name_refuses_several_commands_without_all() {
    let fake = fake().await;
    for exec_id in ["one", "two"] {
        detach(&fake, exec_id, &["signal", exec_id]).await;
    }
    let ran = fake.run(&["kill", ID, "signal"]).await;
    assert_eq!(ran.code, Some(2), "{ran:?}");
    let told = "2 commands are named by signal: one (signal one), two (signal two)";
    assert!(ran.stderr.contains(told) && ran.stderr.contains("--all"), "{ran:?}");
    let ran = fake.run(&["kill", "--json", "--all", "-s", "INT", ID, "signal"]).await;
    let killed: Vec<_> = objects(&ran).iter().map(|one| one["exec_id"].clone()).collect();
    assert_eq!(killed, ["one", "two"]);
    let ran = fake.run(&["kill", ID, "signal"]).await;
    assert_eq!(ran.code, Some(3), "none runs any more: {ran:?}");
}

#[tokio::test]
async fn logs_as_json_are_an_object_a_line() {
    let fake = fake().await;
    detach(&fake, "both", &["both"]).await;
    let ran = fake.run(&["logs", "-f", "--json", ID, "both"]).await;
    assert_eq!((ran.code, objects(&ran).len()), (Some(0), 2), "{ran:?}");
    let mut told = objects(&fake.run(&["logs", "--json", ID, "both"]).await);
    told.sort_by_key(|one| one["stream"].to_string());
    let expected = [
        json!({ "stream": "stderr", "offset": 0, "text": "to stderr\n" }),
        json!({ "stream": "stdout", "offset": 0, "base64": "AP8K" }),
    ];
    assert_eq!(told, expected);
}

#[tokio::test]
async fn console_prints_the_journal_or_says_that_there_is_none() {
    let fake = fake().await;
    let ran = fake.run(&["console", "-n", "5", ID]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(ran.text(), "journalctl --no-pager --boot --lines=5\n");
    let ran = fake.run(&["console", "--json", "-n", "5", ID]).await;
    assert_eq!(ran.text(), "journalctl --no-pager --boot --lines=5 --output=json\n");
    let ran = fake.run(&["console", "-n", "127", ID]).await;
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("its image has no journalctl\nhint: "), "{ran:?}");
    let ran = fake.run(&["console", "-n", "101", ID]).await;
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("journalctl ended with 1\nhint: "), "{ran:?}");
    assert_eq!(fake.run(&["console", "-n", "0", ID]).await.code, Some(2));
}
