use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

fn runner(dir: &Path, parallel: usize) -> Runner {
    let is_worker: IsWorker = |process| process.argv.first().is_some_and(|name| name == "worker");
    Runner::new(dir.join("output"), "/proc".into(), is_worker, parallel).expect("a directory")
}

fn shell(script: &str) -> Program {
    Program { path: "/bin/sh".into(), arguments: vec!["-c".into(), script.into()] }
}

fn argv(script: &str) -> Vec<OsString> {
    vec!["/bin/sh".into(), "-c".into(), script.into()]
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Waits until a file exists.
async fn appears(path: &Path) {
    let deadline = soon();
    while !path.exists() {
        assert!(Instant::now() < deadline, "{} did not come", path.display());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Builds a line that makes the file `begun`, and ends when `over` is there; with an error when it does not come.
fn until_over(begun: &Path, over: &Path) -> String {
    let (begun, over) = (begun.display(), over.display());
    format!("touch {begun}; timeout 120 sh -c 'until [ -e {over} ]; do sleep 0.05; done'")
}

#[tokio::test]
async fn run_returns_exit_status_and_outputs() {
    let dir = tempfile::tempdir().expect("tempdir");
    let runner = runner(dir.path(), 2);
    let done = runner.run(shell("echo out; echo err >&2; exit 7"), soon()).await.expect("runs");
    assert_eq!((done.exit, &*done.stdout, &*done.stderr), (Exit::Code(7), "out\n", "err\n"));
    let done = runner.run(shell("kill -9 $$"), soon()).await.expect("runs");
    assert_eq!(done.exit, Exit::Signal(9));
    let files = std::fs::read_dir(dir.path().join("output")).expect("readable").count();
    assert_eq!(files, 0, "output files are removed");
}

#[tokio::test]
async fn child_inherits_nothing_from_the_agent() {
    let dir = tempfile::tempdir().expect("tempdir");
    // Without close-on-exec, like a descriptor that the agent inherited.
    let file = File::open("/etc/hostname").expect("readable");
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))
        .expect("a descriptor");
    let script = "env | sort; ls /proc/self/fd; readlink /proc/self/fd/0; pwd; \
        [ $(ps -o sid= -p $$) = $$ ] && echo leader";
    let done = runner(dir.path(), 1).run(shell(script), soon()).await.expect("runs");
    // 3 is the directory that `ls` itself has opened.
    let expected = format!("LC_ALL=C\nPATH={PATH}\nPWD=/\n0\n1\n2\n3\n/dev/null\n/\nleader\n");
    assert_eq!(done.stdout, expected, "{}", done.stderr);
}

#[tokio::test]
async fn only_the_end_of_an_endless_output_is_kept() {
    let dir = tempfile::tempdir().expect("tempdir");
    let script = "head -c 300000 /dev/zero | tr '\\0' x; echo; echo last";
    let done = runner(dir.path(), 1).run(shell(script), soon()).await.expect("runs");
    assert_eq!(done.stdout.len() as u64, OUTPUT_BYTES_MAX);
    assert!(done.stdout.ends_with("x\nlast\n"));
}

#[tokio::test]
async fn late_command_is_terminated_and_may_clean_up() {
    let dir = tempfile::tempdir().expect("tempdir");
    let script = "trap 'echo cleaned; exit 3' TERM; echo begun; sleep 60 & wait";
    let deadline = Instant::now() + Duration::from_millis(300);
    let error = runner(dir.path(), 1).run(shell(script), deadline).await.expect_err("late");
    let Error::Deadline { ended: true, said } = error else { panic!("{error:?}") };
    assert_eq!(said, "begun\ncleaned\n");
}

/// A parent that TERM would make say something else, and a worker by its argv.
#[tokio::test]
async fn late_worker_is_terminated_before_its_parent() {
    let dir = tempfile::tempdir().expect("tempdir");
    let worker = "exec -a worker sleep 60";
    let script = format!("trap 'echo told' TERM; bash -c \"{worker}\"; echo rolled back");
    let deadline = Instant::now() + Duration::from_millis(500);
    let program = Program { path: "/bin/bash".into(), arguments: argv(&script)[1..].to_vec() };
    let error = runner(dir.path(), 1).run(program, deadline).await.expect_err("late");
    let Error::Deadline { ended: true, said } = error else { panic!("{error:?}") };
    assert!(said.starts_with("rolled back"), "{said}");
}

#[tokio::test]
async fn command_continues_without_its_caller() {
    let dir = tempfile::tempdir().expect("tempdir");
    let runner = runner(dir.path(), 1);
    let (begun, done) = (dir.path().join("begun"), dir.path().join("done"));
    let script = format!("touch {}; sleep 0.3; touch {}", begun.display(), done.display());
    tokio::select! {
        _ = runner.run(shell(&script), soon()) => panic!("it lasts longer"),
        () = appears(&begun) => {}
    }
    appears(&done).await;
    runner.tracker().close();
    runner.tracker().wait().await;
}

#[tokio::test]
async fn command_without_a_turn_in_time_is_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let runner = runner(dir.path(), 1);
    let begun = dir.path().join("begun");
    let script = format!("touch {}; sleep 1", begun.display());
    let late = async {
        appears(&begun).await;
        runner.run(shell("true"), Instant::now() + Duration::from_millis(50)).await
    };
    let (first, second) = tokio::join!(runner.run(shell(&script), soon()), late);
    first.expect("runs");
    assert!(matches!(second, Err(Error::NoTurn)), "{second:?}");
}

#[tokio::test]
async fn waiting_command_leaves_its_turn_to_others() {
    let dir = tempfile::tempdir().expect("tempdir");
    let runner = runner(dir.path(), 1);
    let (begun, over) = (dir.path().join("begun"), dir.path().join("over"));
    let script = until_over(&begun, &over);
    let others = async {
        appears(&begun).await;
        for _ in 0..3 {
            runner.run(shell("true"), soon()).await.expect("its turn comes");
        }
        std::fs::write(&over, "").expect("written");
    };
    let (waited, ()) = tokio::join!(runner.run_waiting(shell(&script), soon()), others);
    assert_eq!(waited.expect("runs").exit, Exit::Code(0));
}

#[tokio::test]
async fn slow_command_gives_up_its_turn() {
    let dir = tempfile::tempdir().expect("tempdir");
    let runner = runner(dir.path(), 1);
    let (begun, over) = (dir.path().join("begun"), dir.path().join("over"));
    let script = until_over(&begun, &over);
    let late = Instant::now() + Duration::from_secs(120);
    let others = async {
        appears(&begun).await;
        runner.run(shell("true"), late).await.expect("its turn comes while the first runs");
        std::fs::write(&over, "").expect("written");
    };
    let (waited, ()) = tokio::join!(runner.run(shell(&script), late), others);
    assert_eq!(waited.expect("runs").exit, Exit::Code(0));
    // Its turn is released once, not twice.
    assert_eq!((runner.0.turns.available_permits(), runner.0.waits.available_permits()), (1, 4));
}

#[tokio::test]
async fn missing_program_is_a_start_error() {
    let dir = tempfile::tempdir().expect("tempdir");
    let program = Program { path: "/nonexistent".into(), arguments: vec![] };
    let error = runner(dir.path(), 1).run(program, soon()).await.expect_err("none");
    assert!(matches!(error, Error::Start { .. }), "{error:?}");
}

#[tokio::test]
async fn piped_streams_are_separate_and_complete() {
    let script = "cat; echo \"$LC_ALL$RUSTUP_HOME$CARGO\" >&2; kill -TERM $$";
    let mut piped = spawn_piped(&argv(script), Vec::new()).expect("spawns");
    let bytes: Vec<u8> = (0..=255).cycle().take(200_000).collect();
    let (mut stdout, mut stderr) = (Vec::new(), String::new());
    let write = async {
        piped.stdin.write_all(&bytes).await.expect("writes");
        drop(piped.stdin);
    };
    let (_, out, err, exit) = tokio::join!(
        write,
        piped.stdout.read_to_end(&mut stdout),
        piped.stderr.read_to_string(&mut stderr),
        piped.process.wait()
    );
    assert_eq!((out.expect("reads"), err.expect("reads")), (bytes.len(), 2));
    assert_eq!((stdout == bytes, &*stderr), (true, "C\n"));
    assert_eq!(exit.expect("ends"), Exit::Signal(15));
    piped.process.signal(Signal::SIGKILL).expect("nothing to send to");
}

/// Makes a descriptor that reads as this line.
fn line(text: &str) -> OwnedFd {
    sys::image::sealed("line", text.as_bytes()).map_err(|error| error.to_string()).expect("made")
}

/// Opens descriptors until this number is the lowest free one.
fn fill(held: &mut Vec<OwnedFd>, lowest: i32) {
    use std::os::fd::AsRawFd;
    loop {
        let fd = OwnedFd::from(File::open("/dev/null").expect("opened"));
        if fd.as_raw_fd() >= lowest {
            return;
        }
        held.push(fd);
    }
}

/// Starts a child with two descriptors of its own, and one that cannot be started.
async fn started_with(lines: Vec<OwnedFd>, what: &str) {
    let script = "read one </dev/fd/3; read two </dev/fd/4; echo $one $two; ls /proc/self/fd";
    let mut piped = spawn_piped(&argv(script), lines).expect("spawns");
    let mut said = String::new();
    piped.stdout.read_to_string(&mut said).await.expect("reads");
    // 5 is the directory that `ls` itself has opened.
    assert_eq!(said, "one two\n0\n1\n2\n3\n4\n5\n", "{what}");
    assert_eq!(piped.process.wait().await.expect("ends"), Exit::Code(0), "{what}");
    let missing = [OsString::from("/nonexistent")];
    let error = spawn_piped(&missing, vec![line("one\n"), line("two\n")]).expect_err("no program");
    assert_eq!(error.kind(), io::ErrorKind::NotFound, "{what}");
}

#[tokio::test]
async fn children_get_their_descriptors_whatever_number_is_free() {
    let mut held = Vec::new();
    let early = [line("one\n"), line("two\n")];
    for lowest in 3..=300 {
        fill(&mut held, lowest);
        let what = format!("{lowest} is the lowest that is free");
        started_with(vec![line("one\n"), line("two\n")], &what).await;
        let again = early.each_ref().map(|fd| fd.try_clone().expect("a copy"));
        started_with(again.into(), &what).await;
    }
}

#[tokio::test]
async fn children_get_their_descriptors_with_gaps_among_the_numbers() {
    let mut held = Vec::new();
    fill(&mut held, 301);
    for gap in (0..12).chain((12..held.len()).step_by(7)) {
        // The pipe that reports a failed exec may get this very number.
        drop(held.remove(gap));
        started_with(vec![line("one\n"), line("two\n")], &format!("gap {gap}")).await;
        fill(&mut held, 301);
        let filled = held.pop().expect("the gap");
        held.insert(gap, filled);
    }
}

#[tokio::test]
async fn too_many_descriptors_are_an_error() {
    let many = (0..9).map(|_| line("x\n")).collect();
    assert!(spawn_piped(&argv("true"), many).is_err());
}

#[tokio::test]
async fn child_does_not_inherit_the_agents_score() {
    let score = "/proc/self/oom_score_adj";
    // Raising it needs no privilege.
    std::fs::write(score, "200").expect("the score of this process alone");
    let dir = tempfile::tempdir().expect("tempdir");
    let done = runner(dir.path(), 1).run(shell("cat /proc/self/oom_score_adj"), soon()).await;
    assert_eq!(done.expect("runs").stdout, "0\n");
    let mut piped = spawn_piped(&argv("cat /proc/self/oom_score_adj"), Vec::new()).expect("runs");
    let mut text = String::new();
    piped.stdout.read_to_string(&mut text).await.expect("read");
    assert_eq!(text, "0\n");
    let own = std::fs::read_to_string(score).expect("read");
    assert_eq!(own, "200\n", "the agent's own stays");
}

#[tokio::test]
async fn child_moves_to_the_cgroups_for_work_before_it_runs() {
    let dir = tempfile::tempdir().expect("tempdir");
    // Files stand for cgroups; the kernel takes 0 for the process that writes it.
    let [one, gone] = ["one", "gone"].map(|name| dir.path().join(name).join("cgroup.procs"));
    std::fs::create_dir_all(one.parent().expect("a directory")).expect("mkdir");
    std::fs::write(&one, "").expect("written");
    sys::apart::move_children(&[&gone, &one]).expect("no NUL");
    let script = format!("cat {}", one.display());
    let done = runner(dir.path(), 1).run(shell(&script), soon()).await.expect("runs");
    assert_eq!(done.stdout, "0", "moved, although one of the cgroups is away");
}
