//! Terminals of a sandbox whose root makes every access to them wait.

use std::{fs, os::fd::OwnedFd, path::Path};

use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use super::*;
use crate::sys::proc;

/// Puts an order on a terminal.
fn on_terminal(order: Order) -> Order {
    Order { tty: Some(Window { rows: 24, columns: 80 }), ..order }
}

impl Rig {
    /// Pids of the relays of this test's terminals.
    fn relays(&self) -> Vec<u32> {
        let helpers = self.helpers();
        let all = self.pve.pids_of_image("/memfd:pve-sandbox-helper").into_iter();
        let of_helper = |pid: &u32| {
            proc::kin(Path::new("/proc"), *pid).is_some_and(|kin| helpers.contains(&kin.parent))
        };
        all.filter(of_helper).collect()
    }

    /// Takes what root in the sandbox can get from a relay: its open terminal, to share.
    fn steal_terminal(&self) -> OwnedFd {
        let [relay] = self.relays()[..] else { panic!("one relay: {:?}", self.relays()) };
        let fds = fs::read_dir(format!("/proc/{relay}/fd")).expect("its descriptors").flatten();
        let terminal = fds
            .filter(|entry| fs::read_link(entry.path()).is_ok_and(|to| to.ends_with("ptmx")))
            .find_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .expect("a terminal");
        let pid = Pid::from_raw(i32::try_from(relay).expect("a pid")).expect("a pid");
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("it runs");
        pidfd_getfd(pidfd, terminal, PidfdGetfdFlags::empty()).expect("root may")
    }

    /// Waits until the command on the terminal has printed `wanted`.
    async fn until_said(&self, wanted: &str, outputs: &mut Outputs) {
        let mut text = String::new();
        while !text.contains(wanted) {
            match timeout(DEADLINE, outputs.recv()).await.expect("in time").expect("output") {
                Ok(Output::Stdout(bytes)) => text.push_str(&String::from_utf8_lossy(&bytes)),
                other => panic!("{other:?} after {text:?}"),
            }
        }
    }

    async fn until_gone(&self, pids: &[u32]) {
        let begun = Instant::now();
        let runs = |pid: &u32| proc::kin(Path::new("/proc"), *pid).is_some();
        while pids.iter().any(runs) {
            assert!(begun.elapsed() < DEADLINE, "relays are left of {pids:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Types more than any terminal holds, without ever waiting for it to be taken.
async fn paste(input: &mpsc::Sender<Input>) {
    for _ in 0..64 {
        let chunk = Input::Stdin(Bytes::from(vec![b'x'; 16 * 1024]));
        // Input that is not taken in this time stays with the shim: no more fits.
        if timeout(Duration::from_millis(200), input.send(chunk)).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn blocking_terminal_delays_no_other_command() {
    let rig = Rig::new().await;
    let line = "trap '' HUP; stty raw -echo; echo up; sleep 8300";
    let stuck = on_terminal(Order { timeout: Some(Duration::from_secs(6)), ..shell(line) });
    let (_, input, mut outputs) = rig.start(stuck).await.expect("it starts");
    rig.until_said("up", &mut outputs).await;
    let (stolen, relays) = (rig.steal_terminal(), rig.relays());
    fcntl_setfl(&stolen, fcntl_getfl(&stolen).expect("flags") - OFlags::NONBLOCK).expect("set");
    // Every read waits for output that does not come, and all input waits for a reader.
    paste(&input).await;
    let asked = Instant::now();
    for size in 1..50 {
        let window = Window { rows: size, columns: size };
        drop(timeout(Duration::from_millis(5), input.send(Input::Resize(window))).await);
    }
    assert_eq!(rig.run(argv(&["true"])).await.code(), 0);
    let ran = rig.run(on_terminal(shell("tty >/dev/null && exit 3"))).await;
    assert_eq!(ran.code(), 3, "another terminal is not held up either");
    assert_eq!(rig.execs.list(&SandboxRef::Id(id(1))).await.expect("listed").len(), 3);
    let time = format!("8301.{}", std::process::id());
    let killed = on_terminal(shell(&format!("trap '' HUP; sleep {time}")));
    let (_, kill, other) = rig.start(killed).await.expect("it starts");
    rig.until_count(&format!("sleep {time}"), 1).await;
    kill.send(Input::Signal(9)).await.expect("taken");
    assert_eq!(drain(other).await.code(), 137);
    assert!(asked.elapsed() < DEADLINE, "{:?}", asked.elapsed());
    // Its own timeout ends it, too.
    let exit = drain(outputs).await.end.expect("an exit");
    assert_eq!((exit.code, exit.timed_out), (124, true));
    drop(stolen);
    // Linux keeps a waiting writer waiting when the last program is gone. It ends with the helper.
    for helper in rig.helpers() {
        crate::sys::pidfd::signal(helper, 9, || true).expect("killed");
    }
    rig.until_gone(&relays).await;
}

#[tokio::test]
async fn terminal_with_stopped_output_delays_only_its_own_command() {
    let rig = Rig::new().await;
    // `stty sane` waits until all that was written has been read: never, by now.
    let line = "echo up; read x; echo out; stty sane; echo drained; exit 6";
    let order = on_terminal(Order { timeout: Some(Duration::from_secs(3)), ..shell(line) });
    let (_, input, mut outputs) = rig.start(order).await.expect("it starts");
    rig.until_said("up", &mut outputs).await;
    input.send(Input::Stdin(Bytes::from_static(b"\x13\n"))).await.expect("taken");
    assert_eq!(rig.run(argv(&["true"])).await.code(), 0);
    let ran = drain(outputs).await;
    assert_eq!(ran.code(), 124);
    assert!(!ran.out().contains("drained"), "{}", ran.out());
    // Output that continues where it was stopped loses nothing.
    let (_, input, mut outputs) = rig.start(on_terminal(shell(line))).await.expect("it starts");
    rig.until_said("up", &mut outputs).await;
    input.send(Input::Stdin(Bytes::from_static(b"\x13\n"))).await.expect("taken");
    input.send(Input::Stdin(Bytes::from_static(b"\x11"))).await.expect("taken");
    let relays = rig.relays();
    let ran = drain(outputs).await;
    assert!(ran.out().contains("out") && ran.out().contains("drained"), "{}", ran.out());
    assert_eq!(ran.code(), 6);
    rig.until_gone(&relays).await;
}

#[tokio::test]
async fn raw_terminal_passes_bytes_unchanged() {
    let rig = Rig::new().await;
    let line = "stty raw -echo; echo up; head -c 300000 | md5sum | cut -d' ' -f1";
    let (_, input, mut outputs) = rig.start(on_terminal(shell(line))).await.expect("it starts");
    rig.until_said("up", &mut outputs).await;
    let bytes: Vec<u8> = (0..300_000u32).map(|n| (n ^ (n >> 7)).to_le_bytes()[0]).collect();
    let feed = async {
        for chunk in bytes.chunks(50_000) {
            input.send(Input::Stdin(Bytes::copy_from_slice(chunk))).await.expect("taken");
        }
    };
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), &bytes).expect("written");
    let (ran, ()) = tokio::join!(drain(outputs), feed);
    let wanted = rig.run(shell(&format!("md5sum <{} | cut -d' ' -f1", file.path().display())));
    assert_eq!(ran.out().trim(), wanted.await.out().trim());
    assert_eq!(ran.code(), 0);
}

#[tokio::test]
async fn killed_relay_hangs_up_only_its_own_terminal() {
    let rig = Rig::new().await;
    let time = format!("8302.{}", std::process::id());
    let order = on_terminal(argv(&["sleep", &time]));
    let (_, _input, outputs) = rig.start(order).await.expect("it starts");
    rig.until_count(&format!("sleep {time}"), 1).await;
    let (_, input, other) = rig.start(shell("read x; exit 9")).await.expect("it starts");
    for relay in rig.relays() {
        crate::sys::pidfd::signal(relay, 9, || true).expect("killed");
    }
    assert_eq!(drain(outputs).await.code(), 129, "as of any terminal that hangs up");
    input.send(Input::Stdin(Bytes::from_static(b"end\n"))).await.expect("taken");
    assert_eq!(drain(other).await.code(), 9);
}
