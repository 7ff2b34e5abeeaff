use std::{io::Write, os::fd::OwnedFd, time::Duration};

use proptest::prelude::*;
use tokio::io::AsyncReadExt;

use super::*;
use crate::run;

/// Runs the script here, on this machine, and returns what the command wrote.
async fn run_here(shell: &str, order: &Ordered) -> Result<(i32, Vec<u8>), String> {
    let environment = environment(&BTreeMap::new(), &order.env, false, "m-1");
    let mut argv = argv(&order.user, order.cwd.as_deref(), &order.command, &environment);
    argv.splice(0..1, shell.split(' ').map(OsString::from));
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
    let mut process = run::spawn_piped(&argv, &[], Some(OwnedFd::from(theirs))).expect("it starts");
    drop(process.stdin);
    ours.set_read_timeout(Some(Duration::from_secs(20))).expect("set");
    let said = tokio::task::spawn_blocking(move || {
        let mut said = [0u8; ANSWER_BYTES_MAX];
        let read = std::io::Read::read(&mut ours, &mut said).expect("in time");
        let said = String::from_utf8_lossy(&said[..read]).trim_end().to_owned();
        (said, ours)
    });
    let (said, mut ours) = said.await.expect("no panic");
    if said != READY {
        return Err(said);
    }
    ours.write_all(lines(&environment).as_bytes()).expect("written");
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    process.stdout.read_to_end(&mut stdout).await.expect("read");
    process.stderr.read_to_end(&mut stderr).await.expect("read");
    let exit = process.process.wait().await.expect("an exit");
    let run::Exit::Code(code) = exit else { panic!("{exit:?}") };
    if code == 125 {
        return Err(String::from_utf8_lossy(&stderr).into_owned());
    }
    stdout.extend(stderr);
    Ok((code, stdout))
}

#[derive(Debug, Clone)]
struct Ordered {
    user: User,
    cwd: Option<String>,
    command: Command,
    env: BTreeMap<String, String>,
}

impl Ordered {
    fn new(argv: &[&str]) -> Self {
        Self {
            user: User::Id(0),
            cwd: None,
            command: Command::Argv(argv.iter().map(ToString::to_string).collect()),
            env: BTreeMap::new(),
        }
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.env.insert(name.to_owned(), value.to_owned());
        self
    }
}

/// The shells that may be /bin/sh somewhere; bash behaves in its POSIX mode.
fn shells() -> Vec<&'static str> {
    let all = ["/bin/dash", "/bin/bash --posix", "/bin/busybox sh"];
    let is_there = |shell: &&str| {
        shell.split(' ').next().is_some_and(|path| std::path::Path::new(path).exists())
    };
    all.into_iter().filter(is_there).collect()
}

/// What `env -0` says, without what shells add on their own.
fn variables(output: &[u8]) -> BTreeMap<String, String> {
    let text = String::from_utf8(output.to_vec()).expect("UTF-8");
    text.split_terminator('\0')
        .map(|entry| entry.split_once('=').expect("an entry"))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

#[tokio::test]
async fn a_command_gets_its_environment_and_no_more() {
    for shell in shells() {
        let order = Ordered::new(&["env", "-0"])
            .env("A", "b c")
            .env("LINES_", "one\ntwo\n\n+three\n.\n")
            .env("QUOTES", "'\"$HOME`id`\\n$(id)")
            .env("UMLAUT", "ü")
            .env("EMPTY", "")
            .env("UID", "7")
            .env("IFS", "x")
            .env("OPTIND", "no number")
            .env("PWD", "/elsewhere")
            .env("LC_ALL", "xx_YY.UTF-8")
            .env("__pve_l", "mine");
        let (code, output) = run_here(shell, &order).await.expect("it runs");
        assert_eq!(code, 0, "{shell}: {}", String::from_utf8_lossy(&output));
        let mut found = variables(&output);
        for (name, value) in &order.env {
            assert_eq!(found.remove(name).as_ref(), Some(value), "{shell}: {name}");
        }
        for (name, value) in [
            ("HOME", "/root"),
            ("USER", "root"),
            ("LOGNAME", "root"),
            ("XDG_RUNTIME_DIR", "/run/user/0"),
            ("PATH", DEFAULTS[0].1),
            ("LANG", "C.UTF-8"),
            (MARK, "m-1"),
        ] {
            assert_eq!(found.remove(name).as_deref(), Some(value), "{shell}: {name}");
        }
        // bash adds these on its own.
        for name in ["SHLVL", "_", "OLDPWD"] {
            found.remove(name);
        }
        assert!(found.is_empty(), "{shell}: {found:?}");
    }
}

#[tokio::test]
async fn arguments_pass_as_they_are() {
    let arguments =
        ["", "a  b", "c'd", "e\"f", "$HOME", "*", "a\nb", "-n", "--", "`id`", "\\", "ü"];
    for shell in shells() {
        let argv = [&["printf", "%s\\0"], &arguments[..]].concat();
        let mut order = Ordered::new(&argv);
        let expected: String = arguments.iter().map(|argument| format!("{argument}\0")).collect();
        let (code, output) = run_here(shell, &order).await.expect("it runs");
        assert_eq!((code, String::from_utf8_lossy(&output).as_ref()), (0, expected.as_str()));
        order.command = Command::Shell("echo \"$0 $# $HOME\"; exit 42".into());
        let (code, output) = run_here(shell, &order).await.expect("it runs");
        assert_eq!((code, output.as_slice()), (42, b"bash 0 /root\n".as_slice()), "{shell}");
    }
}

#[tokio::test]
async fn a_program_with_an_equals_sign_is_a_program() {
    let dir = tempfile::tempdir().expect("a directory");
    let program = dir.path().join("A=B");
    std::os::unix::fs::symlink("/bin/echo", &program).expect("linked");
    let order = Ordered::new(&[program.to_str().expect("plain"), "hello"]).env("UID", "7");
    for shell in shells() {
        assert_eq!(run_here(shell, &order).await, Ok((0, b"hello\n".to_vec())), "{shell}");
    }
}

#[tokio::test]
async fn users_and_directories() {
    for shell in shells() {
        let mut order = Ordered::new(&["sh", "-c", "echo $(id -u):$(id -g) $USER $HOME $(pwd)"]);
        order.user = User::Name("www-data".into());
        order.cwd = Some("/tmp".into());
        assert_eq!(
            run_here(shell, &order).await,
            Ok((0, b"33:33 www-data /var/www /tmp\n".to_vec())),
            "{shell}"
        );
        // A home that is not there.
        order.cwd = None;
        order.user = User::Name("nobody".into());
        assert_eq!(
            run_here(shell, &order).await,
            Ok((0, b"65534:65534 nobody /nonexistent /\n".to_vec())),
            "{shell}"
        );
        order.user = User::Id(54_321);
        assert_eq!(
            run_here(shell, &order).await,
            Ok((0, b"54321:54321 54321 / /\n".to_vec())),
            "{shell}"
        );
        order.user = User::Name("no-such-user".into());
        assert_eq!(run_here(shell, &order).await, Err(NO_USER.into()), "{shell}");
        order.user = User::Id(0);
        for dir in ["/nosuch", "/etc/passwd", "/tmp\n/x", "/$HOME", "/-"] {
            order.cwd = Some(dir.into());
            assert_eq!(run_here(shell, &order).await, Err(NO_CWD.into()), "{shell}");
        }
    }
}

#[tokio::test]
async fn what_is_not_there_is_127_and_what_is_no_program_126() {
    for shell in shells() {
        for (program, code) in [("/nosuch", 127), ("nosuch", 127), ("/etc/passwd", 126)] {
            let (found, said) = run_here(shell, &Ordered::new(&[program])).await.expect("it runs");
            assert_eq!(found, code, "{shell} {program}: {}", String::from_utf8_lossy(&said));
        }
    }
}

#[tokio::test]
async fn no_descriptor_is_left_open() {
    for shell in shells() {
        let order = Ordered::new(&["ls", "/proc/self/fd"]);
        // 3 is the directory that `ls` reads.
        assert_eq!(run_here(shell, &order).await, Ok((0, b"0\n1\n2\n3\n".to_vec())), "{shell}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// What the script makes of the lines is what was meant, whatever the values hold.
    #[test]
    fn lines_say_what_is_meant(env in proptest::collection::btree_map("[A-Za-z_][A-Za-z0-9_]{0,8}", "[^\\x00]{0,40}", 0..8)) {
        let text = lines(&env);
        let mut read = BTreeMap::new();
        let mut last = String::new();
        let mut ended = false;
        for line in text.split_terminator('\n') {
            prop_assert!(!ended, "nothing follows the end");
            if line == "." {
                ended = true;
            } else if let Some(more) = line.strip_prefix('+') {
                let value: &mut String = read.get_mut(&last).expect("a first line");
                value.push('\n');
                value.push_str(more);
            } else {
                let (name, value) = line.split_once('=').expect("an entry");
                last = name.to_owned();
                read.insert(last.clone(), value.to_owned());
            }
        }
        prop_assert!(ended);
        let ordinary: BTreeMap<_, _> = env.into_iter().filter(|(name, _)| !is_special(name)).collect();
        prop_assert_eq!(read, ordinary);
    }

    /// No name makes the script's own names, and no caller's string is an option of lxc-attach.
    #[test]
    fn argv_is_the_script_then_the_command(args in proptest::collection::vec("[^\\x00]{1,20}", 1..5), cwd in proptest::option::of("/[^\\x00]{0,20}")) {
        let command = Command::Argv(args.clone());
        let argv = argv(&User::Id(5), cwd.as_deref(), &command, &BTreeMap::new());
        let expected: Vec<OsString> = ["/bin/sh", "-c", SCRIPT, "sh", "u", "5", cwd.as_deref().unwrap_or("")]
            .into_iter().map(OsString::from).chain(args.into_iter().map(OsString::from)).collect();
        prop_assert_eq!(argv, expected);
    }
}
