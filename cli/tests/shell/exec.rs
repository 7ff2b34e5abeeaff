//! Tests of `exec`: bytes in both directions, and correct exit codes.

use std::{process::Stdio, time::Duration};

use nix::{
    pty::{Winsize, openpty},
    sys::{
        signal::{Signal, kill},
        termios,
    },
    unistd::Pid,
};
use proto::sandbox::v1::{ExecExit, exec_start::Command};
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    time::timeout,
};

use crate::{
    fake::{Behaviour, Fake, ID, finish},
    session::Session,
};

/// Plays a command of the fake, which the first argument selects.
pub(crate) async fn play(session: &Session) {
    let start = session.start.clone();
    let words = match start.command {
        Some(Command::Argv(argv)) => argv.args,
        Some(Command::Shell(line)) => vec!["shell".into(), line],
        Some(Command::Sftp(_)) | None => vec!["nothing".into()],
    };
    let exit = |code| session.end(ExecExit { code, ..ExecExit::default() });
    let second = words.get(1).cloned().unwrap_or_default();
    match words[0].as_str() {
        "exit" => exit(second.parse().expect("a number")),
        "shell" => {
            session.say(0, second.as_bytes()).await;
            exit(0);
        }
        "both" => {
            session.say(0, &[0, 0xff, b'\n']).await;
            session.say(1, b"to stderr\n").await;
            exit(0);
        }
        "cat" => {
            while let Some(bytes) = session.stdin().await {
                session.say(0, &bytes).await;
            }
            exit(0);
        }
        "env" => {
            let told =
                format!("{:?} {} {} {:?}\n", start.env, start.cwd, start.user, start.timeout);
            session.say(0, told.as_bytes()).await;
            exit(0);
        }
        "terminal" => {
            let window = start.window.unwrap_or_default();
            let told = format!("tty {} {}x{} ", start.tty, window.cols, window.rows);
            session.say(0, told.as_bytes()).await;
            while let Some(bytes) = session.stdin().await {
                if bytes.contains(&4) {
                    break;
                }
                session.say(0, format!("{:?} ", bytes::Bytes::from(bytes)).as_bytes()).await;
            }
            exit(3);
        }
        // Its number of lines chooses how it ends.
        "journalctl" => match words[3].as_str() {
            "--lines=127" => exit(127),
            "--lines=101" => exit(1),
            _ => {
                session.say(0, format!("{}\n", words.join(" ")).as_bytes()).await;
                exit(0);
            }
        },
        "timeout" => session.end(ExecExit { code: 124, signal: 9, timed_out: true }),
        "signal" => {
            session.say(0, b"ready\n").await;
            let number = session.signalled(&[]).await;
            session.end(ExecExit { code: 128 + number, signal: number, timed_out: false });
        }
        "stubborn" => {
            session.say(0, b"ready\n").await;
            let number = session.signalled(&[2]).await;
            session.end(ExecExit { code: 128 + number, signal: number, timed_out: false });
        }
        "flood" => loop {
            session.say(0, &[b'y'; 65536]).await;
        },
        "refuse" => session.fail(),
        _vanish => session.vanish(),
    }
}

async fn fake() -> Fake {
    Fake::start(Behaviour::default()).await
}

#[tokio::test]
async fn exec_ends_with_the_exit_code_of_the_command() {
    let fake = fake().await;
    for code in [0, 1, 2, 42, 125, 255] {
        let ran = fake.run(&["exec", ID, "--", "exit", &code.to_string()]).await;
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(code), ""), "{ran:?}");
    }
    let ran = fake.run(&["exec", ID, "--", "timeout"]).await;
    assert_eq!(ran.code, Some(124), "{ran:?}");
    assert!(ran.stderr.contains("its time was over"), "{ran:?}");
}

#[tokio::test]
async fn exec_ends_with_125_when_it_fails_itself() {
    let fake = fake().await;
    let lost = fake.run(&["exec", ID, "--", "vanish"]).await;
    assert_eq!(lost.code, Some(125), "a lost command must not look like exit 0: {lost:?}");
    assert!(lost.stderr.contains("before the command's exit code came"), "{lost:?}");
    let refused = fake.run(&["exec", ID, "--", "refuse"]).await;
    assert_eq!(refused.code, Some(125));
    assert!(
        refused.stderr.starts_with("error: no such program (EXEC_FAILED)\nhint: "),
        "{refused:?}"
    );
    let unknown = fake.run(&["exec", "100002", "--", "true"]).await;
    assert_eq!(unknown.code, Some(125));
    assert!(unknown.stderr.contains("(SANDBOX_NOT_FOUND)"), "{unknown:?}");
    assert_eq!(fake.run(&["exec", ID]).await.code, Some(125), "usage");
    let mut nowhere = fake.command(&["exec", ID, "--", "exit", "0"]);
    let nowhere = nowhere.env("SANDBOXCTL_ENDPOINT", "https://localhost:1").spawn().expect("spawn");
    let nowhere = finish(nowhere).await;
    assert_eq!(nowhere.code, Some(125));
    assert!(nowhere.stderr.contains("cannot reach the controller"), "{nowhere:?}");
}

#[tokio::test]
async fn exec_passes_bytes_through_unchanged() {
    let fake = fake().await;
    let ran = fake.run(&["exec", ID, "--", "both"]).await;
    assert_eq!(
        (ran.stdout.as_slice(), ran.stderr.as_str()),
        (&[0, 0xff, b'\n'][..], "to stderr\n")
    );
    let bytes: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
    let ran = fake.run_with(&["exec", "-i", ID, "--", "cat"], &bytes).await;
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout == bytes, "{} bytes came back", ran.stdout.len());
    let ran = fake.run_with(&["exec", ID, "--", "cat"], b"not asked for").await;
    assert_eq!((ran.code, ran.stdout.len()), (Some(0), 0), "without -i stdin stays here");
    let ran = fake.run(&["exec", ID, "--shell", "cd / && ls"]).await;
    assert_eq!(ran.text(), "cd / && ls");
}

#[tokio::test]
async fn exec_passes_its_options_to_the_controller() {
    let args = [
        "exec",
        "--env",
        "A=1",
        "--cwd",
        "/srv",
        "--user",
        "ada",
        "--timeout",
        "90s",
        ID,
        "--",
        "env",
    ];
    let ran = fake().await.run(&args).await;
    assert!(ran.text().contains("\"A\": \"1\"") && ran.text().contains("/srv ada"), "{ran:?}");
    assert!(ran.text().contains("seconds: 90"), "{ran:?}");
}

#[tokio::test]
async fn exec_json_holds_the_output_and_the_exit_code() {
    let ran = fake().await.run(&["exec", "--json", ID, "--", "both"]).await;
    let value = ran.json();
    assert_eq!((&value["id"], &value["code"]), (&ID.into(), &0.into()), "{value}");
    assert_eq!(value["stderr"], "to stderr\n");
}

/// Starts a run and waits until it says that it is ready.
async fn ready(fake: &Fake, what: &str) -> (tokio::process::Child, Pid) {
    let mut child = fake.command(&["exec", ID, "--", what]).spawn().expect("spawn");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let ready = timeout(Duration::from_secs(20), lines.next_line()).await;
    assert_eq!(ready.expect("in time").expect("a line").as_deref(), Some("ready"));
    let pid = Pid::from_raw(child.id().expect("it runs").cast_signed());
    (child, pid)
}

#[tokio::test]
async fn exec_forwards_signals_to_the_command() {
    let fake = fake().await;
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGHUP, 129), (Signal::SIGTERM, 143)] {
        let (child, pid) = ready(&fake, "signal").await;
        kill(pid, signal).expect("signalled");
        assert_eq!(finish(child).await.code, Some(code), "128 + signal, said by the command");
    }
}

#[tokio::test]
async fn third_interrupt_kills_the_command() {
    let fake = fake().await;
    let (child, pid) = ready(&fake, "stubborn").await;
    for told in 1..=3 {
        kill(pid, Signal::SIGINT).expect("signalled");
        if told < 3 {
            fake.behaviour.sessions.until_signals(told).await;
        }
    }
    assert_eq!(finish(child).await.code, Some(130));
    let list = fake.run(&["ps", "--json", ID]).await.json();
    assert_eq!(list[0]["signal"], 9, "it was not left behind: {list}");
}

#[tokio::test]
async fn exec_reattaches_after_a_broken_connection_and_repeats_no_output() {
    let fake = fake().await;
    let cuts = [2, 1, 5, 3];
    fake.behaviour.cuts.lock().expect("no panic").extend(cuts);
    let bytes: Vec<u8> = (0..700_000_u32).map(|n| (n % 249) as u8).collect();
    let ran = fake.run_with(&["exec", "-i", ID, "--", "cat"], &bytes).await;
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout == bytes, "{} bytes came back", ran.stdout.len());
    let told = ran.stderr.matches("connection lost, attaching again").count();
    assert_eq!(told, cuts.len(), "{}", ran.stderr);
    assert_eq!(fake.behaviour.sessions.list().len(), 1, "it ran once");
}

#[tokio::test]
async fn exec_id_runs_the_command_once() {
    let fake = fake().await;
    let args = ["exec", "--exec-id", "job", ID, "--shell", "hello"];
    for _ in 0..2 {
        assert_eq!(fake.run(&args).await.text(), "hello");
    }
    let ran = fake.run(&["exec", "--detach", "--exec-id", "bg", ID, "--", "cat"]).await;
    assert_eq!((ran.code, ran.text()), (Some(0), "bg\n"), "{ran:?}");
    let made_up = fake.run(&["exec", "-d", "--json", ID, "--", "signal"]).await.json();
    let exec_id = made_up["exec_id"].as_str().expect("an id").to_owned();

    let list = fake.run(&["ps", "--json", ID]).await.json();
    let find = |id: &str| {
        let list = list.as_array().expect("a list");
        list.iter().find(|exec| exec["id"] == id).cloned().expect("listed")
    };
    assert_eq!((&find("job")["code"], &find("job")["stdout_bytes"]), (&json!(0), &json!(5)));
    assert_eq!(find("bg")["code"], 0, "its stdin was at its end");
    assert_eq!(find(&exec_id)["code"], json!(null));
    let table = fake.run(&["ps", ID]).await;
    assert!(table.text().contains("EXEC ID") && table.text().contains("ended"), "{table:?}");

    let logs = fake.run(&["logs", ID, &exec_id]).await;
    assert_eq!((logs.code, logs.text()), (Some(0), "ready\n"), "as far as it is");
    let follow = fake.command(&["logs", "-f", ID, &exec_id]).spawn().expect("spawn");
    let killed = fake.run(&["kill", "-s", "KILL", ID, &exec_id]).await;
    assert_eq!(killed.code, Some(0), "{killed:?}");
    let followed = finish(follow).await;
    assert_eq!((followed.code, followed.text()), (Some(137), "ready\n"), "{followed:?}");

    assert_eq!(fake.run(&["logs", ID, "none"]).await.code, Some(3));
    assert_eq!(fake.run(&["logs", "-f", ID, "none"]).await.code, Some(125));
    let none = fake.run(&["kill", ID, "none"]).await;
    assert!(none.code == Some(3) && none.stderr.contains("sandboxctl ps"), "{none:?}");
}

#[tokio::test]
async fn closed_stdout_ends_the_program_silently() {
    let fake = fake().await;
    let mut child =
        fake.command(&["exec", ID, "--", "flood"]).stdout(Stdio::piped()).spawn().expect("spawn");
    drop(child.stdout.take());
    let ran = finish(child).await;
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(141), ""));
    let list = fake.run(&["ps", "--json", ID]).await.json();
    assert_eq!(list[0]["signal"], 9, "it does not run on for nobody: {list}");
}

#[tokio::test]
async fn terminal_passes_every_key_to_the_command() {
    let fake = fake().await;
    let size = Winsize { ws_row: 30, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None).expect("pty");
    let before = termios::tcgetattr(&pty.slave).expect("termios");
    let end = || Stdio::from(pty.slave.try_clone().expect("fd"));
    let mut child = fake
        .command(&["exec", "-it", ID, "--", "terminal"])
        .stdin(end())
        .stdout(end())
        .stderr(end())
        .spawn()
        .expect("spawn");
    let mut ours = tokio::fs::File::from_std(std::fs::File::from(pty.master));
    let mut seen = String::new();
    for (wanted, then) in [("tty true 100x30 ", "\x03"), ("b\"\\x03\" ", "\x04")] {
        let told = timeout(Duration::from_secs(20), async {
            while !seen.contains(wanted) {
                let mut bytes = [0; 256];
                let length = ours.read(&mut bytes).await.expect("the terminal");
                seen.push_str(&String::from_utf8_lossy(&bytes[..length]));
            }
        });
        told.await.unwrap_or_else(|_| panic!("{wanted:?} did not come: {seen:?}"));
        ours.write_all(then.as_bytes()).await.expect("typed");
        ours.flush().await.expect("typed");
    }
    let ended = timeout(Duration::from_secs(20), child.wait()).await.expect("in time");
    assert_eq!(ended.expect("it ran").code(), Some(3), "{seen}");
    let after = termios::tcgetattr(&pty.slave).expect("termios");
    assert_eq!(before.local_flags, after.local_flags, "the terminal is as it was");
}
