use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

fn runner(dir: &Path, parallel: usize) -> Runner {
    Runner::new(dir.join("output"), "/proc".into(), parallel).expect("a directory")
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

/// Waits until a file has come.
async fn appears(path: &Path) {
    let deadline = soon();
    while !path.exists() {
        assert!(Instant::now() < deadline, "{} did not come", path.display());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn exit_status_and_outputs_are_data() {
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
async fn a_child_gets_nothing_of_the_agents() {
    let dir = tempfile::tempdir().expect("tempdir");
    // Without close-on-exec, as something that the agent inherited.
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
async fn a_late_command_is_told_to_stop_and_may_clean_up() {
    let dir = tempfile::tempdir().expect("tempdir");
    let script = "trap 'echo cleaned; exit 3' TERM; echo begun; sleep 60 & wait";
    let deadline = Instant::now() + Duration::from_millis(300);
    let error = runner(dir.path(), 1).run(shell(script), deadline).await.expect_err("late");
    let Error::Deadline { ended: true, said } = error else { panic!("{error:?}") };
    assert_eq!(said, "begun\ncleaned\n");
}

/// A parent that TERM would make say something else, and a worker whose argv is a task's.
#[tokio::test]
async fn the_worker_is_told_first() {
    let dir = tempfile::tempdir().expect("tempdir");
    let worker = "exec -a 'task UPID:n:1:2:3:vzclone:900:root@pam:' sleep 60";
    let script = format!("trap 'echo told' TERM; bash -c \"{worker}\"; echo rolled back");
    let deadline = Instant::now() + Duration::from_millis(500);
    let program = Program { path: "/bin/bash".into(), arguments: argv(&script)[1..].to_vec() };
    let error = runner(dir.path(), 1).run(program, deadline).await.expect_err("late");
    let Error::Deadline { ended: true, said } = error else { panic!("{error:?}") };
    assert!(said.starts_with("rolled back"), "{said}");
}

#[tokio::test]
async fn a_command_outlives_its_caller() {
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
async fn commands_take_turns() {
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
async fn a_program_that_is_not_there() {
    let dir = tempfile::tempdir().expect("tempdir");
    let program = Program { path: "/nonexistent".into(), arguments: vec![] };
    let error = runner(dir.path(), 1).run(program, soon()).await.expect_err("none");
    assert!(matches!(error, Error::Start { .. }), "{error:?}");
}

#[tokio::test]
async fn pipes_are_apart_and_whole() {
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
