//! Real processes, on this machine or in the real container that `PVE_SANDBOX_EXEC_LXC` names.

mod archives;
mod attach;
mod background;
mod burst;
mod entered;
mod files;
mod forward;
mod given_up;
mod hang_up;
mod hostile;
mod refused;
mod silent;
mod stalled;
mod stuck;
mod terminal;

use std::time::Duration;

use bytes::Bytes;
use daemon::disk::SoundDisk;
use proto::name::NodeName;
use tokio::time::{Instant, sleep, timeout};

use super::{
    order::{Command, Exit, Started, User, Window},
    *,
};
use crate::{
    clock::SystemClock,
    journal::{Journal, MemoryJournal, Pools},
    pve::{
        Pve,
        fake::{FakeCluster, Pace},
    },
    saga::Faults,
    sandbox::{
        Bridge, Lifetimes, Limits, Options, Probe, Template,
        tests::{LONG, TEMPLATE, id, order as creation, vmid},
    },
    tasks::Tasks,
};
use entered::{Entered, Here};

/// Most commands that a shim runs.
const RUNNING_MAX: usize = 64;
/// Bytes of each output that a shim keeps.
const KEPT: u64 = 4 * 1024 * 1024;
/// Longest wait of a test for one thing.
const DEADLINE: Duration = Duration::from_secs(30);

struct Rig {
    execs: Execs,
    sandboxes: Arc<Sandboxes>,
    pve: Arc<Entered>,
    shims: Arc<Here>,
    tasks: Tasks,
}

/// Output of a command, up to its end.
#[derive(Debug)]
struct Ran {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    end: Result<Exit, Error>,
}

impl Ran {
    fn out(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("UTF-8")
    }

    fn code(&self) -> u8 {
        self.end.as_ref().expect("an exit").code
    }
}

/// Builds an order for a shell line.
fn shell(line: &str) -> Order {
    Order {
        sandbox: SandboxRef::Id(id(1)),
        command: Command::Shell(line.to_owned()),
        cwd: None,
        env: Default::default(),
        user: User::Id(0),
        timeout: Some(DEADLINE),
        tty: None,
        exec_id: None,
        detached: false,
        spare_background: false,
        title: None,
    }
}

fn argv(list: &[&str]) -> Order {
    let list = list.iter().map(ToString::to_string).collect();
    Order { command: Command::Argv(list), ..shell("") }
}

/// Reads everything up to the end, which must come.
async fn drain(mut outputs: Outputs) -> Ran {
    let mut ran = Ran { stdout: Vec::new(), stderr: Vec::new(), end: Err(failed("none".into())) };
    loop {
        match timeout(DEADLINE, outputs.recv()).await.expect("in time").expect("an end") {
            Ok(Output::Stdout(bytes)) => ran.stdout.extend(bytes),
            Ok(Output::Stderr(bytes)) => ran.stderr.extend(bytes),
            Ok(Output::Exit(exit)) => ran.end = Ok(exit),
            Err(error) => ran.end = Err(error),
        }
        if ran.end.as_ref().map_or_else(|error| error.message != "none", |_| true) {
            assert!(outputs.recv().await.is_none(), "nothing follows the end");
            return ran;
        }
    }
}

impl Rig {
    async fn new() -> Self {
        Self::with(None).await
    }

    /// Starts another agent with the same shims.
    async fn over(shims: Arc<Here>) -> Self {
        Self::with(Some(shims)).await
    }

    /// True for a process that this test started: other tests run in parallel.
    fn is_ours(&self, pid: u32) -> bool {
        let proc = std::path::Path::new("/proc");
        let own = std::process::id();
        let mut at = Some(pid);
        while let Some(kin) = at.and_then(|pid| crate::sys::proc::kin(proc, pid)) {
            if kin.parent == own {
                return true;
            }
            at = (kin.parent > 1).then_some(kin.parent);
        }
        false
    }

    /// Pids of the helpers that this test's shims have started.
    fn helpers(&self) -> Vec<u32> {
        let all = self.pve.pids_of_image("/memfd:pve-sandbox-helper");
        // A fork of a helper, which works on files, has the same image.
        let forked = |pid: u32| {
            let kin = crate::sys::proc::kin(std::path::Path::new("/proc"), pid);
            kin.is_none_or(|kin| all.contains(&kin.parent))
        };
        all.iter().copied().filter(|pid| self.is_ours(*pid) && !forked(*pid)).collect()
    }

    fn signal_helpers(&self, number: i32) {
        let ours = self.helpers();
        assert!(!ours.is_empty(), "there is no helper");
        for pid in ours {
            crate::sys::pidfd::signal(pid, number, || true).expect("signalled");
        }
    }

    async fn with(shims: Option<Arc<Here>>) -> Self {
        let name: NodeName = "node1".parse().expect("valid");
        let cluster = FakeCluster::new(std::slice::from_ref(&name), Pace::default(), 7);
        cluster.add_template(&name, vmid(TEMPLATE));
        let pools = Pools {
            vmids: (vmid(100_000), vmid(100_099)),
            addresses: ([10, 100, 1, 2].into(), [10, 100, 1, 254].into()),
            address_quarantine_ms: 0,
        };
        let options = Options {
            templates: vec![Template {
                snapshot: "base".parse().expect("valid"),
                vmid: vmid(TEMPLATE),
                size: proto::spec::Size { cpu_cores: 1, memory_mib: 512, disk_gib: 0 },
                probe: Probe::None,
                bridge: None,
                allowed: Default::default(),
                link: Default::default(),
                ports: Default::default(),
            }],
            network: Bridge {
                name: "vmbr0".into(),
                prefix: 24,
                gateway: [10, 100, 1, 1].into(),
                own: Vec::new(),
                dhcp: Default::default(),
            },
            limits: Limits::default(),
            lifetimes: Lifetimes::default(),
            on_reboot: Default::default(),
            labels: Vec::new(),
            number: None,
        };
        let journal = MemoryJournal::new("journal", pools, Arc::new(SoundDisk));
        let pve = Arc::new(Entered::new(cluster.node(&name)));
        let serving = shims;
        let tasks = Tasks::default();
        let sandboxes = Sandboxes::open(
            options,
            Arc::clone(&pve) as Arc<dyn Pve>,
            Arc::new(journal) as Arc<dyn Journal>,
            // Orders carry deadlines by the host's own clock.
            Arc::new(SystemClock::default()),
            tasks.clone(),
            Faults::default(),
        )
        .await
        .expect("opens");
        let mut creation = creation(1);
        creation.spec.env = [
            ("FROM_SANDBOX".to_owned(), "1".to_owned()),
            ("BOTH".to_owned(), "sandbox".to_owned()),
        ]
        .into();
        let record = sandboxes.create(creation, LONG).await.expect("admitted");
        assert_eq!(record.phase, crate::journal::Phase::Running, "{record:?}");
        let shims = serving.unwrap_or_else(|| {
            Arc::new(Here {
                entered: Arc::clone(&pve),
                dir: tempfile::tempdir().expect("tempdir"),
                output_bytes_max: crate::shim::OUTPUT_BYTES_MAX.into(),
                serving: Default::default(),
            })
        });
        let execs = Execs::new(Arc::clone(&sandboxes), Arc::clone(&shims) as Arc<dyn shims::Shims>);
        Self { execs, sandboxes, pve, shims, tasks }
    }

    async fn start(&self, order: Order) -> Result<(Started, mpsc::Sender<Input>, Outputs), Error> {
        let (input, inputs) = mpsc::channel(4);
        let (started, outputs) = self.execs.start(order, inputs).await?;
        Ok((started, input, outputs))
    }

    /// Runs a command to its end with an empty stdin.
    async fn run(&self, order: Order) -> Ran {
        let (_, input, outputs) = self.start(order).await.expect("it starts");
        // The command may have ended by now.
        input.send(Input::Eof).await.ok();
        drain(outputs).await
    }

    /// Command lines of all processes in the sandbox.
    async fn lines(&self) -> Vec<(u32, String)> {
        let all = self.pve.processes(vmid(100_000)).await.into_iter();
        let line = |pid: u32| {
            let argv = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&argv).replace('\0', " ");
            Some((pid, line))
        };
        all.filter_map(line).collect()
    }

    /// Counts processes whose command line starts with `start`.
    async fn count(&self, start: &str) -> usize {
        self.lines().await.iter().filter(|(_, line)| line.starts_with(start)).count()
    }

    /// Kills processes with this text in their arguments, as a stop of the container does.
    async fn end(&self, text: &str) {
        let begun = Instant::now();
        loop {
            let lines = self.lines().await;
            let mut held = lines.iter().filter(|(_, line)| line.contains(text)).peekable();
            if held.peek().is_none() {
                return;
            }
            assert!(begun.elapsed() < DEADLINE, "something holds {text}");
            // Again: a process has no arguments while it becomes another program, and is not found then.
            for (pid, _) in held {
                crate::sys::pidfd::signal(*pid, 9, || true).ok();
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn until_count(&self, text: &str, wanted: usize) {
        let begun = Instant::now();
        while self.count(text).await != wanted {
            let found = self.count(text).await;
            assert!(begun.elapsed() < DEADLINE, "{found} of {text}, not {wanted}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn until_none_holds(&self, text: &str) {
        let begun = Instant::now();
        while self.lines().await.iter().any(|(_, line)| line.contains(text)) {
            assert!(begun.elapsed() < DEADLINE, "something holds {text}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn until_no_place_is_taken(&self) {
        let taken = || self.execs.0.places.available_permits() < ATTACHED_MAX;
        let begun = Instant::now();
        while taken() {
            assert!(begun.elapsed() < DEADLINE, "a command holds its place");
            sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test]
async fn command_returns_separate_outputs_and_its_exit_code() {
    let rig = Rig::new().await;
    let ran = rig.run(shell("echo out; echo err >&2; exit 3")).await;
    assert_eq!((ran.out(), ran.stderr.as_slice()), ("out\n", b"err\n".as_slice()));
    assert_eq!(ran.end, Ok(Exit { code: 3, signal: 0, timed_out: false }));
    for code in [0, 1, 42, 124, 125, 126, 127, 255] {
        let ran = rig.run(shell(&format!("exit {code}"))).await;
        assert_eq!(ran.end, Ok(Exit { code, signal: 0, timed_out: false }));
    }
    for (name, number) in [("KILL", 9), ("TERM", 15), ("SEGV", 11)] {
        let ran = rig.run(shell(&format!("kill -{name} $$"))).await;
        assert_eq!(ran.end, Ok(Exit { code: 128 + number, signal: number, timed_out: false }));
    }
    assert_eq!(rig.run(argv(&["true"])).await.code(), 0);
    assert_eq!(rig.run(argv(&["/nosuch"])).await.code(), 127);
    assert_eq!(rig.run(argv(&["/etc/passwd"])).await.code(), 126);
    let (started, input, outputs) = rig.start(argv(&["cat"])).await.expect("it starts");
    input.send(Input::Eof).await.expect("taken");
    assert_eq!((started.boot, drain(outputs).await.code()), (1, 0));
    assert!(started.exec_id.starts_with("x-"), "{started:?}");
}

#[tokio::test]
async fn stdin_and_outputs_pass_bytes_unchanged() {
    let rig = Rig::new().await;
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n ^ (n >> 7)).to_le_bytes()[0]).collect();
    let mut order = shell("tee /dev/stderr");
    order.user = User::Name("www-data".into());
    let (_, input, outputs) = rig.start(order).await.expect("it starts");
    let all = Bytes::from(bytes.clone());
    let feed = tokio::spawn(async move {
        for start in (0..all.len()).step_by(100_000) {
            let end = all.len().min(start + 100_000);
            input.send(Input::Stdin(all.slice(start..end))).await.expect("taken");
        }
        input.send(Input::Eof).await.expect("taken");
        // Input after the end is ignored.
        drop(input.send(Input::Stdin(Bytes::from_static(b"late"))).await);
    });
    let ran = drain(outputs).await;
    feed.await.expect("no panic");
    assert_eq!(ran.code(), 0);
    assert!(ran.stdout == bytes && ran.stderr == bytes, "the bytes are others");
}

#[tokio::test]
async fn command_inherits_nothing_from_the_host() {
    let rig = Rig::new().await;
    let mut order = shell("env; pwd; ls /proc/self/fd; echo bound=$#$0");
    order.env = [("BOTH".to_owned(), "caller\nline two".to_owned())].into();
    let ran = rig.run(order).await;
    let text = ran.out();
    for line in [
        "FROM_SANDBOX=1",
        "BOTH=caller",
        "line two",
        "HOME=/root",
        "USER=root",
        "XDG_RUNTIME_DIR=/run/user/0",
        "LANG=C.UTF-8",
        "container=lxc",
        "/root",
        "bound=0bash",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is missing in {text}");
    }
    for host in ["CARGO", "LC_ALL", "RUST", "NEXTEST", "TERM="] {
        assert!(!text.contains(host), "{host} is in {text}");
    }
    let fds: Vec<&str> = text.lines().filter(|line| line.parse::<u8>().is_ok()).collect();
    assert_eq!(fds, ["0", "1", "2", "3"], "3 is the directory that ls reads");
}

#[tokio::test]
async fn user_and_cwd_are_resolved_in_the_sandbox() {
    let rig = Rig::new().await;
    let who = || shell("echo $(id -u) $(id -g) $(id -un) $HOME $PWD");
    let mut order = who();
    order.user = User::Name("www-data".into());
    order.cwd = Some("/tmp".into());
    assert_eq!(rig.run(order).await.out(), "33 33 www-data /var/www /tmp\n");
    let mut order = who();
    order.user = User::Id(33);
    order.cwd = Some("/usr".into());
    assert_eq!(rig.run(order).await.out(), "33 33 www-data /var/www /usr\n");

    let mut order = shell("true");
    order.user = User::Name("no-such-user".into());
    let error = rig.start(order).await.expect_err("no such user");
    assert_eq!((error.reason, error.message.contains("user")), (Reason::FieldInvalid, true));
    let mut order = shell("true");
    order.cwd = Some("/nosuch".into());
    let error = rig.start(order).await.expect_err("no such directory");
    assert_eq!((error.reason, error.message.contains("cwd")), (Reason::FieldInvalid, true));
    rig.until_no_place_is_taken().await;
}

/// Builds a process tree with everything that is hard to find: other groups, other sessions,
/// orphans, and one that ignores SIGTERM.
fn thicket(mark: &str) -> String {
    format!(
        "trap '' TERM; (sleep {mark}.1 & sleep {mark}.2 & wait) & setsid sleep {mark}.3 & \
         (setsid sh -c 'sleep {mark}.4 & sleep {mark}.5 & wait' &); \
         env -i PVE_SANDBOX_EXEC=other sleep {mark}.6 & sleep {mark}.7; sleep {mark}.8"
    )
}

#[tokio::test]
async fn timeout_kills_only_the_processes_of_its_command() {
    let rig = Rig::new().await;
    let (_, _input, other) = rig.start(argv(&["sleep", "7101"])).await.expect("it starts");
    let mut order = shell(&thicket("7100"));
    order.timeout = Some(Duration::from_millis(1500));
    let begun = Instant::now();
    let (_, _keep, outputs) = rig.start(order).await.expect("it starts");
    rig.until_count("sleep 7100.", 7).await;
    let ran = drain(outputs).await;
    let exit = ran.end.expect("an exit");
    assert_eq!((exit.code, exit.timed_out), (124, true));
    assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
    assert!(rig.lines().await.iter().all(|(_, line)| !line.contains("7100.")));
    assert_eq!(rig.count("sleep 7101").await, 1);
    drop(other);
    rig.until_count("sleep 7101", 0).await;
    rig.until_no_place_is_taken().await;
}

#[tokio::test]
async fn hang_up_kills_all_processes_of_the_command() {
    let rig = Rig::new().await;
    let (_, _input, outputs) = rig.start(shell(&thicket("7200"))).await.expect("it starts");
    rig.until_count("sleep 7200.", 7).await;
    drop(outputs);
    rig.until_none_holds("7200.").await;
    rig.until_no_place_is_taken().await;
}

#[tokio::test]
async fn list_shows_the_title_that_a_caller_chose() {
    let rig = Rig::new().await;
    let title = Some(order::Title("make\u{7} test".to_owned()));
    let titled = Order { title, ..shell("read x") };
    let (_, _input, _outputs) = rig.start(titled).await.expect("it starts");
    let list = rig.execs.list(&SandboxRef::Id(id(1))).await.expect("listed");
    assert_eq!((list.len(), &*list[0].command), (1, "make test"));
}

#[tokio::test]
async fn hang_up_before_the_start_leaves_no_process() {
    let rig = Rig::new().await;
    for _ in 0..5 {
        let (_keep, inputs) = mpsc::channel(1);
        let start = rig.execs.start(argv(&["sleep", "7300"]), inputs);
        drop(timeout(Duration::from_micros(300), start).await);
    }
    rig.until_no_place_is_taken().await;
    rig.until_count("sleep 7300", 0).await;
}

#[tokio::test]
async fn background_process_does_not_delay_the_exit() {
    let rig = Rig::new().await;
    // Only the test ends these processes, so another run may have left some.
    let mark = format!("7400.{}", std::process::id());
    let begun = Instant::now();
    let ran = rig.run(shell(&format!("echo before; sleep {mark} & echo bg"))).await;
    assert_eq!((ran.out(), ran.code()), ("before\nbg\n", 0));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    // The background process keeps running.
    rig.until_count(&format!("sleep {mark}"), 1).await;
    rig.end(&mark).await;
    // One that keeps writing delays nothing either, and earlier output is complete.
    let ran = rig
        .run(shell(&format!("seq 100000; (while echo {mark} && sleep 0.01; do :; done) & exit 5")))
        .await;
    assert_eq!(ran.code(), 5);
    let text = ran.out();
    assert!(text.starts_with("1\n2\n") && text.contains("\n100000\n"), "{}", text.len());
    rig.end(&mark).await;
}

#[tokio::test]
async fn command_stops_writing_while_its_caller_does_not_read() {
    let rig = Rig::new().await;
    let line = "i=0; while :; do head -c 65536 /dev/zero; i=$((i+1)); echo $i >&2; done";
    let (_, _input, mut outputs) = rig.start(shell(line)).await.expect("it starts");
    // Without a reader the command stops writing after a while. It counts on stderr what it wrote.
    sleep(Duration::from_secs(1)).await;
    let mut written = 0;
    let mut read = 0;
    while read < 3_000_000 {
        match timeout(DEADLINE, outputs.recv()).await.expect("in time").expect("more") {
            Ok(Output::Stdout(bytes)) => read += bytes.len(),
            Ok(Output::Stderr(bytes)) => {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                if written == 0 {
                    written = text.lines().last().and_then(|l| l.parse().ok()).unwrap_or(0);
                }
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(written <= 16, "{written} times 64 KiB were written while nobody read");
    drop(outputs);
    rig.until_count("head -c 65536", 0).await;
    rig.until_no_place_is_taken().await;
}

#[tokio::test]
async fn signal_overtakes_unread_stdin() {
    let rig = Rig::new().await;
    let line = "trap 'echo got; exit 9' USR1; echo up; while :; do sleep 0.05; done";
    let (_, input, mut outputs) = rig.start(shell(line)).await.expect("it starts");
    let up = timeout(DEADLINE, outputs.recv()).await.expect("in time").expect("output");
    assert_eq!(up, Ok(Output::Stdout(Bytes::from_static(b"up\n"))));
    for _ in 0..3 {
        input.send(Input::Stdin(Bytes::from(vec![0; 60_000]))).await.expect("taken");
    }
    input.send(Input::Signal(10)).await.expect("taken");
    let ran = drain(outputs).await;
    assert_eq!((ran.out(), ran.code()), ("got\n", 9));
}

#[tokio::test]
async fn terminal_handles_size_input_eof_and_interrupt() {
    let rig = Rig::new().await;
    let line = "tty >/dev/null && stty size; read x; echo \"<$x> $TERM\"; stty size; \
                read y; echo \"<$y>\"; exit 7";
    let mut order = shell(line);
    order.tty = Some(Window { rows: 30, columns: 90 });
    let (_, input, mut outputs) = rig.start(order).await.expect("it starts");
    let mut text = String::new();
    let mut wait_for = async |wanted: &str, outputs: &mut Outputs| {
        while !text.contains(wanted) {
            match timeout(DEADLINE, outputs.recv()).await.expect("in time").expect("output") {
                Ok(Output::Stdout(bytes)) => text.push_str(&String::from_utf8_lossy(&bytes)),
                other => panic!("{other:?} after {text:?}"),
            }
        }
    };
    wait_for("30 90", &mut outputs).await;
    input.send(Input::Resize(Window { rows: 41, columns: 121 })).await.expect("taken");
    input.send(Input::Stdin(Bytes::from_static(b"one\n"))).await.expect("taken");
    wait_for("<one> xterm-256color", &mut outputs).await;
    wait_for("41 121", &mut outputs).await;
    input.send(Input::Eof).await.expect("taken");
    let ran = drain(outputs).await;
    assert!(ran.out().contains("<>"), "{}", ran.out());
    assert_eq!(ran.code(), 7);

    // Ctrl-C.
    let mut order = shell("sleep 7500");
    order.tty = Some(Window { rows: 24, columns: 80 });
    let (_, input, outputs) = rig.start(order).await.expect("it starts");
    rig.until_count("sleep 7500", 1).await;
    input.send(Input::Stdin(Bytes::from_static(b"\x03"))).await.expect("taken");
    assert_eq!(drain(outputs).await.code(), 130);
    // A long output arrives complete.
    let mut order = shell("seq 30000");
    order.tty = Some(Window { rows: 24, columns: 80 });
    let ran = rig.run(order).await;
    assert_eq!(ran.code(), 0);
    let wanted: String = (1..=30_000).map(|n| format!("{n}\r\n")).collect();
    assert!(ran.out() == wanted, "{:?}", &ran.out()[..40]);
}

#[tokio::test]
async fn command_over_the_running_limit_is_refused() {
    let rig = Rig::new().await;
    let mut held = Vec::new();
    for _ in 0..RUNNING_MAX {
        held.push(rig.start(argv(&["sleep", "7600"])).await.expect("it starts"));
    }
    let error = rig.start(argv(&["true"])).await.expect_err("one too many");
    assert_eq!(error.reason, Reason::TooManyCalls);
    assert!(error.retry_after.is_some());
    // Somebody can look at the sandbox and change it all the same.
    let short = || Order { timeout: Some(Duration::from_secs(20)), ..argv(&["true"]) };
    assert_eq!(rig.run(short()).await.code(), 0);
    let name = SandboxRef::Id(id(1));
    rig.execs.files(&name, &order::User::Id(0)).stat("/".to_owned()).await.expect("has a place");
    held.truncate(RUNNING_MAX - 1);
    let begun = Instant::now();
    while rig.start(argv(&["true"])).await.is_err() {
        assert!(begun.elapsed() < DEADLINE, "no place became free");
        sleep(Duration::from_millis(20)).await;
    }
    drop(held);
    rig.until_count("sleep 7600", 0).await;
    rig.until_no_place_is_taken().await;
}

#[tokio::test]
async fn command_in_a_sandbox_that_is_not_running_is_refused() {
    let rig = Rig::new().await;
    rig.pve.frozen.store(true, std::sync::atomic::Ordering::Relaxed);
    let error = rig.start(argv(&["true"])).await.expect_err("frozen");
    assert_eq!((error.reason, error.message.contains("frozen")), (Reason::SandboxNotRunning, true));
    rig.pve.frozen.store(false, std::sync::atomic::Ordering::Relaxed);

    let (_, _input, outputs) = rig.start(shell("sleep 7700; true")).await.expect("it starts");
    rig.until_count("sleep 7700", 1).await;
    rig.sandboxes.stop(&id(1), LONG).await.expect("stops");
    // The fake stops nothing.
    rig.end("7700").await;
    let error = drain(outputs).await.end.expect_err("the sandbox stopped");
    assert_eq!(error.reason, Reason::ExecLost);
    let error = rig.start(argv(&["true"])).await.expect_err("stopped");
    assert_eq!(error.reason, Reason::SandboxNotRunning);
    rig.sandboxes.start(&id(1), LONG).await.expect("starts");
    let (started, _input, outputs) = rig.start(argv(&["true"])).await.expect("it starts");
    assert_eq!((started.boot, drain(outputs).await.code()), (2, 0));
    rig.sandboxes.delete(&id(1), LONG).await.expect("deletes");
    let error = rig.start(argv(&["true"])).await.expect_err("deleted");
    assert_eq!(error.reason, Reason::SandboxDeleted);
    let unknown = Order { sandbox: SandboxRef::Id(id(9)), ..argv(&["true"]) };
    let error = rig.start(unknown).await.expect_err("unknown");
    assert_eq!(error.reason, Reason::SandboxNotFound);
}
