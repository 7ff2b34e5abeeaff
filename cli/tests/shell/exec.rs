//! `exec`: bytes both ways, and exit codes that never lie.

use std::{process::Stdio, time::Duration};

use daemon::status::Refusal;
use nix::{
    pty::{Winsize, openpty},
    sys::{
        signal::{Signal, kill},
        termios,
    },
    unistd::Pid,
};
use proto::{
    reason,
    sandbox::v1::{
        ExecExit, ExecRequest, ExecResponse, ExecStart, exec_request, exec_response::Message,
        exec_start::Command,
    },
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    sync::mpsc,
    time::timeout,
};
use tonic::{Code, Status, Streaming};

use crate::fake::{Behaviour, Fake, ID, finish, rest, say};

/// The fake's side: does as the first argument says.
pub(crate) async fn play(
    start: ExecStart,
    mut messages: Streaming<ExecRequest>,
    to: mpsc::Sender<Result<ExecResponse, Status>>,
) {
    let words = match start.command {
        Some(Command::Argv(argv)) => argv.args,
        Some(Command::Shell(line)) => vec!["shell".into(), line],
        None => vec!["nothing".into()],
    };
    let exit = |code| Message::Exit(ExecExit { code, ..ExecExit::default() });
    let second = words.get(1).cloned().unwrap_or_default();
    match words[0].as_str() {
        "exit" => say(&to, exit(second.parse().expect("a number"))).await,
        "shell" => {
            say(&to, Message::Stdout(second.into())).await;
            say(&to, exit(0)).await;
        }
        "both" => {
            say(&to, Message::Stdout(vec![0, 0xff, b'\n'].into())).await;
            say(&to, Message::Stderr("to stderr\n".into())).await;
            say(&to, exit(0)).await;
        }
        "cat" => {
            for message in rest(messages).await {
                if let exec_request::Message::Stdin(bytes) = message {
                    say(&to, Message::Stdout(bytes)).await;
                }
            }
            say(&to, exit(0)).await;
        }
        "env" => {
            let told =
                format!("{:?} {} {} {:?}\n", start.env, start.cwd, start.user, start.timeout);
            say(&to, Message::Stdout(told.into())).await;
            say(&to, exit(0)).await;
        }
        "terminal" => {
            let window = start.window.unwrap_or_default();
            let told = format!("tty {} {}x{} ", start.tty, window.cols, window.rows);
            say(&to, Message::Stdout(told.into())).await;
            while let Ok(Some(request)) = messages.message().await {
                match request.message {
                    Some(exec_request::Message::Stdin(bytes)) if bytes.contains(&4) => break,
                    Some(exec_request::Message::Stdin(bytes)) => {
                        say(&to, Message::Stdout(format!("{bytes:?} ").into())).await;
                    }
                    _ => {}
                }
            }
            say(&to, exit(3)).await;
        }
        "timeout" => {
            let ended = ExecExit { code: 124, signal: 9, timed_out: true };
            say(&to, Message::Exit(ended)).await;
        }
        "signal" => {
            say(&to, Message::Stdout("ready\n".into())).await;
            while let Ok(Some(request)) = messages.message().await {
                if let Some(exec_request::Message::Signal(number)) = request.message {
                    let ended = ExecExit { code: 128 + number, signal: number, timed_out: false };
                    say(&to, Message::Exit(ended)).await;
                    return;
                }
            }
        }
        "flood" => {
            while to
                .send(Ok(ExecResponse { message: Some(Message::Stdout(vec![b'y'; 65536].into())) }))
                .await
                .is_ok()
            {}
        }
        "refuse" => {
            let status = Refusal::new(Code::Internal, reason::EXEC_FAILED, "no such program");
            to.send(Err(status.into())).await.ok();
        }
        _vanish => {}
    }
}

async fn fake() -> Fake {
    Fake::start(Behaviour::default()).await
}

#[tokio::test]
async fn the_exit_code_is_the_commands_own() {
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
async fn our_own_failures_are_125() {
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
async fn bytes_go_through_as_they_are() {
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
async fn how_it_is_run_is_passed_on() {
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
async fn json_holds_all_of_it() {
    let ran = fake().await.run(&["exec", "--json", ID, "--", "both"]).await;
    let value = ran.json();
    assert_eq!((&value["id"], &value["code"]), (&ID.into(), &0.into()), "{value}");
    assert_eq!(value["stderr"], "to stderr\n");
}

#[tokio::test]
async fn signals_reach_the_command() {
    let fake = fake().await;
    let mut child = fake.command(&["exec", ID, "--", "signal"]).spawn().expect("spawn");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let ready = timeout(Duration::from_secs(20), lines.next_line()).await;
    assert_eq!(ready.expect("in time").expect("a line").as_deref(), Some("ready"));
    let pid = Pid::from_raw(child.id().expect("it runs").cast_signed());
    kill(pid, Signal::SIGINT).expect("signalled");
    assert_eq!(finish(child).await.code, Some(130), "128 + SIGINT, said by the command");
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_it_without_a_word() {
    let fake = fake().await;
    let mut child =
        fake.command(&["exec", ID, "--", "flood"]).stdout(Stdio::piped()).spawn().expect("spawn");
    drop(child.stdout.take());
    let ran = finish(child).await;
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(141), ""));
}

#[tokio::test]
async fn on_a_terminal_every_key_goes_to_the_command() {
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
