//! Tests of short names for sandboxes and commands, of completion, and of lists.

use proto::sandbox::v1::Phase;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::fake::{Behaviour, Fake, ID, finish};

async fn fake() -> Fake {
    Fake::start(Behaviour { snapshots: vec!["small"], ..Behaviour::default() }).await
}

#[tokio::test]
async fn sandbox_is_named_by_a_part_of_its_id_and_by_what_is_remembered() {
    let fake = fake().await;
    for part in ["sn02q", "pvelxc-01h4", "01h455"] {
        let ran = fake.run(&["stop", part]).await;
        assert_eq!(ran.text(), format!("{ID} stopped\n"), "{ran:?}");
    }
    let ran = fake.run(&["exec", "sn02q", "exit", "7"]).await;
    assert_eq!(ran.code, Some(7), "{ran:?}");
    let ran = fake.run(&["get", "@current"]).await;
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("hint: `sandboxctl use ID` chooses one"), "{ran:?}");
    assert_eq!(fake.run(&["shell"]).await.code, Some(125), "none is chosen");
    assert_eq!(fake.run(&["use", "sn02q"]).await.text(), format!("{ID}\n"));
    assert_eq!(fake.run(&["use"]).await.text(), format!("{ID}\n"));
    assert_eq!(fake.run(&["get", "@current", "-o", "json"]).await.json()["id"], ID);
    assert_eq!(fake.run(&["get", "@last"]).await.code, Some(2));
    assert_eq!(fake.run(&["create", "--no-wait"]).await.code, Some(0));
    assert_eq!(fake.run(&["stop", "@last"]).await.text(), format!("{ID} stopped\n"));
    fake.run(&["use", "--none"]).await;
    assert_eq!(fake.run(&["get", "@current"]).await.code, Some(2));
    let ran = fake.run(&["get", "@home"]).await;
    assert!(ran.code == Some(2) && ran.stderr.contains("@last"), "{ran:?}");
}

#[tokio::test]
async fn whole_id_and_vmid_cost_no_list() {
    use std::sync::atomic::Ordering;
    let fake = fake().await;
    fake.run(&["get", ID]).await;
    fake.run(&["get", "100001"]).await;
    assert_eq!(fake.behaviour.lists.load(Ordering::SeqCst), 0);
    fake.run(&["get", "sn02q"]).await;
    assert_eq!(fake.behaviour.lists.load(Ordering::SeqCst), 2, "two pages");
}

#[tokio::test]
async fn exec_ids_are_named_by_their_beginning() {
    let fake = fake().await;
    let ran = fake.run(&["exec", "-d", "--exec-id", "nightly-build", ID, "signal"]).await;
    assert_eq!(ran.text(), "nightly-build\n", "{ran:?}");
    assert_eq!(fake.run(&["logs", ID, "night"]).await.text(), "ready\n");
    assert_eq!(fake.run(&["kill", "-s", "KILL", ID, "night"]).await.code, Some(0));
}

#[tokio::test]
async fn completion_knows_what_there_is_and_is_silent_when_it_fails() {
    let fake = fake().await;
    let complete = async |words: &[&str]| {
        let ran = fake.run(&[&["__complete", "--"], words].concat()).await;
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{ran:?}");
        ran.text().to_owned()
    };
    let ids = complete(&["get", "pv"]).await;
    assert!(ids.starts_with(&format!("{ID}\t")) && ids.ends_with("node2 small\n"), "{ids}");
    assert!(complete(&["exec", "-it", "@"]).await.starts_with("@current\t"));
    assert_eq!(complete(&["create", "--snapshot", ""]).await, "small\t1 cpu, 512 MiB\n");
    assert_eq!(complete(&["create", "--node=node1"]).await, "--node=node1\t\n");
    assert!(complete(&["cp", "pvel"]).await.starts_with(&format!("{ID}:\t")));
    assert_eq!(complete(&["cp", "./x"]).await, "");
    fake.run(&["exec", "--exec-id", "job", ID, "exit", "0"]).await;
    assert!(complete(&["logs", "-f", "sn02q", ""]).await.starts_with("job\t"));
    assert!(complete(&["wa"]).await.starts_with("wait\t"));
    let mut nowhere = fake.command(&["__complete", "--", "get", "pv"]);
    let nowhere = nowhere.env("SANDBOXCTL_ENDPOINT", "https://localhost:1").spawn().expect("spawn");
    let nowhere = finish(nowhere).await;
    assert_eq!((nowhere.code, nowhere.text(), nowhere.stderr.as_str()), (Some(0), "", ""));
}

#[tokio::test]
async fn completion_never_hangs_on_a_silent_controller() {
    let fake = fake().await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let endpoint = format!("https://localhost:{}", listener.local_addr().expect("bound").port());
    let since = tokio::time::Instant::now();
    let mut silent = fake.command(&["__complete", "--", "get", "pv"]);
    let silent = finish(silent.env("SANDBOXCTL_ENDPOINT", endpoint).spawn().expect("spawn")).await;
    assert_eq!((silent.code, silent.text()), (Some(0), ""), "{silent:?}");
    assert!(since.elapsed() < std::time::Duration::from_secs(5), "{:?}", since.elapsed());
}

#[tokio::test]
async fn bash_completes_ids() {
    let fake = fake().await;
    let script = fake.run(&["completion", "bash"]).await;
    let program = env!("CARGO_BIN_EXE_sandboxctl");
    let text = format!(
        "{}\nCOMP_WORDS=({program} get pv); COMP_CWORD=2; _sandboxctl; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        script.text()
    );
    let environment = fake.command(&[]);
    let mut bash = tokio::process::Command::new("/bin/bash");
    bash.args(["-c", &text]).env_clear().env("PATH", "/usr/bin:/bin");
    for (key, value) in environment.as_std().get_envs() {
        bash.env(key, value.expect("set"));
    }
    let output = bash.output().await.expect("bash");
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{ID}\n"), "{output:?}");
}

#[tokio::test]
async fn lists_take_columns_filters_and_an_order() {
    let fake = fake().await;
    let ran = fake.run(&["ls", "--columns", "phase,vmid", "--no-headers"]).await;
    assert_eq!(ran.text(), "running           100001\ncreating (clone)  100001\n", "{ran:?}");
    let ran = fake.run(&["ls", "--sort", "-phase", "--columns", "phase", "--no-headers"]).await;
    assert_eq!(ran.text(), "running\ncreating (clone)\n");
    let list = fake.run(&["ls", "-o", "json", "--sort", "phase"]).await.json();
    assert_eq!(list[0]["phase"], "creating");
    let ran = fake.run(&["ls", "-o", "name", "--filter", "phase=creating"]).await;
    assert_eq!(ran.text(), format!("{ID}\n"));
    let asked = fake.behaviour.filters.lock().expect("no panic").last().cloned();
    assert_eq!(asked.expect("asked").phases, [i32::from(Phase::Creating)], "the API filters");
    let ran = fake.run(&["ls", "--filter", "meta.user=eve"]).await;
    assert_eq!((ran.text(), ran.stderr.as_str()), ("", "no sandbox is like this\n"));
    let wide = fake.run(&["ls", "-o", "wide"]).await;
    assert!(wide.text().contains("METADATA") && wide.text().contains("user=ada"), "{wide:?}");
    for wrong in [&["ls", "--filter", "colour=red"][..], &["ls", "--columns", "colour"]] {
        let ran = fake.run(wrong).await;
        assert_eq!(ran.code, Some(2), "{ran:?}");
    }
    let ran = fake.run(&["node", "ls", "-o", "name"]).await;
    assert_eq!(ran.text(), "node1\nnode2\n");
    let ran = fake.run(&["ps", ID, "--sort", "colour"]).await;
    assert!(ran.stderr.contains("the columns are exec-id, state"), "{ran:?}");
    assert_eq!(
        fake.run(&["events", ID, "--columns", "kind", "--last", "1"]).await.text(),
        "KIND\nstopped\n"
    );
}

#[tokio::test]
async fn watched_list_tells_each_change_once_also_over_a_broken_connection() {
    let fake = Fake::start(Behaviour { watch_breaks: true, ..Behaviour::default() }).await;
    let args = ["ls", "--watch", "--filter", "meta.user=ada", "--columns", "phase"];
    let mut child = fake.command(&args).spawn().expect("spawn");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    for phase in ["running", "paused", "stopped"] {
        let line = tokio::time::timeout(std::time::Duration::from_secs(20), lines.next_line());
        assert_eq!(line.await.expect("in time").expect("read").as_deref(), Some(phase));
    }
    let filters = fake.behaviour.filters.lock().expect("no panic").clone();
    assert!(filters.iter().all(|filter| filter.metadata["user"] == "ada"), "{filters:?}");
    assert_eq!(fake.behaviour.lists.load(std::sync::atomic::Ordering::SeqCst), 0, "no polling");
}
