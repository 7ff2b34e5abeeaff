//! Terminals: their kind, their size, and changes of it.

use nix::{
    pty::{OpenptyResult, Winsize, openpty},
    unistd::ttyname,
};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn terminal_has_its_kind_and_its_size() {
    let door = Door::open().await;
    let mut ssh = door.ssh(1, &door.id);
    let ran = output(ssh.args(["-tt", "-o", "SetEnv=TERM=vt220"]).arg("echo $TERM")).await;
    assert!(ran.status.success(), "{}", text(&ran.stderr));
    let (start, _) = door.lab.holder(&door.id).last_command().expect("one");
    assert!(start.tty && start.window.is_some(), "{start:?}");
    assert!(!text(&ran.stdout).trim().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn change_of_the_window_is_passed_on() {
    let door = Door::open().await;
    let size = Winsize { ws_row: 30, ws_col: 90, ws_xpixel: 0, ws_ypixel: 0 };
    let OpenptyResult { master: _terminal, slave } = openpty(&size, None).expect("a terminal");
    let path = ttyname(&slave).expect("a path");
    // The terminal is its own, so that it is signalled when the size changes.
    let mut ssh = Command::new("setsid");
    ssh.args(["--ctty", "ssh"]).args(door.options(1)).args(["-tt", "-l", &door.id, "127.0.0.1"]);
    ssh.arg("echo up; sleep 60").stdin(slave).stdout(Stdio::piped()).kill_on_drop(true);
    let mut ssh = ssh.spawn().expect("it runs");
    let mut up = [0; 2];
    let out = ssh.stdout.as_mut().expect("one");
    timeout(STEP, out.read_exact(&mut up)).await.expect("in time").expect("read");
    let agent = door.lab.holder(&door.id);
    let window = || agent.last_command().and_then(|(_, window)| window);
    let (start, _) = agent.last_command().expect("one");
    assert_eq!(start.window, Some(WindowSize { rows: 30, cols: 90 }));
    let mut resize = Command::new("stty");
    resize.arg("-F").arg(&path).args(["rows", "33", "cols", "101"]);
    assert!(output(&mut resize).await.status.success());
    until("the size", || async { window() == Some(WindowSize { rows: 33, cols: 101 }) }).await;
}
