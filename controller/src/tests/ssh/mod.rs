//! The SSH server with OpenSSH's own client, over simulated agents whose commands run on this machine.

#![expect(clippy::disallowed_methods, reason = "OpenSSH's client and the commands are processes")]

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Output, Stdio},
};

use proto::sandbox::v1::*;
use russh::keys::{
    PrivateKey,
    ssh_key::{LineEnding, private::Ed25519Keypair},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, unix::pipe},
    process::Command,
    time::{Instant, timeout},
};

mod bad_input;
mod bounds;
mod commands;
mod forwards;
mod reverse;
mod terminal;

use super::*;
use crate::{
    node::fake::{Program, counted},
    ssh,
};

/// Longest time of one step of a test.
const STEP: Duration = Duration::from_secs(30);
/// Bytes of a file: more than the windows and buffers on its way.
const FILE_BYTES: usize = 6_000_000;

/// Server with a sandbox of team red, and a client.
struct Door {
    lab: Lab,
    id: String,
    address: SocketAddr,
    dir: tempfile::TempDir,
}

fn key(seed: u8) -> PrivateKey {
    Ed25519Keypair::from_seed(&[seed; 32]).into()
}

fn line(key: &PrivateKey) -> String {
    key.public_key().to_openssh().expect("a line")
}

/// Runs programs here, and SFTP as the helper does.
fn here(start: &ExecStart) -> Option<Program> {
    let exit = |code: u32| ExecExit { code, ..ExecExit::default() };
    match start.command.as_ref()? {
        exec_start::Command::Argv(argv) => {
            let (program, args) = argv.args.split_first().expect("a program");
            let mut child = Command::new(program)
                .args(args)
                .env_clear()
                .envs([("PATH", "/usr/bin:/bin")])
                .envs(&start.env)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
                .expect("it runs");
            let (stdin, stdout) =
                (child.stdin.take().expect("one"), child.stdout.take().expect("one"));
            let stderr = Box::new(child.stderr.take().expect("one"));
            let exit = Box::pin(async move {
                let status = child.wait().await.expect("ended");
                match std::os::unix::process::ExitStatusExt::signal(&status) {
                    Some(signal) => {
                        let signal = signal.unsigned_abs();
                        ExecExit { code: 128 + signal, signal, timed_out: false }
                    }
                    None => exit(status.code().expect("a code").unsigned_abs()),
                }
            });
            Some(Program { stdin: Box::new(stdin), stdout: Box::new(stdout), stderr, exit })
        }
        exec_start::Command::Sftp(_) => {
            let (from, stdin) = std::io::pipe().expect("a pipe");
            let (stdout, to) = std::io::pipe().expect("a pipe");
            let served = tokio::task::spawn_blocking(move || sftp::serve(from, to));
            let exit = Box::pin(async move {
                let served = served.await.expect("no panic");
                exit(served.is_err().into())
            });
            Some(Program {
                stdin: Box::new(pipe::Sender::from_owned_fd(stdin.into()).expect("a pipe")),
                stdout: Box::new(pipe::Receiver::from_owned_fd(stdout.into()).expect("a pipe")),
                stderr: Box::new(tokio::io::empty()),
                exit,
            })
        }
        exec_start::Command::Shell(_) => None,
    }
}

impl Door {
    async fn open() -> Self {
        Self::of(Lab::new().await).await
    }

    async fn of(lab: Lab) -> Self {
        let id = lab.create("r1").await.expect("made").id;
        lab.until(&id, Phase::Running).await;
        lab.agents.iter().for_each(|agent| agent.run_with(here));
        let dir = tempfile::tempdir().expect("a directory");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let settings =
            ssh::Settings { host: String::new(), port: address.port(), connections_max: 64 };
        let host_key = key(99);
        let controller = lab.controller.as_ref().expect("a controller");
        tokio::spawn(controller.ssh(host_key.clone(), &settings).serve(listener));
        let known = format!("door {}\n", line(&host_key));
        std::fs::write(dir.path().join("known_hosts"), known).expect("written");
        let door = Self { lab, id, address, dir };
        door.add(1, "laptop").await;
        door
    }

    /// Lets a key of this number log in; returns its id.
    async fn add(&self, seed: u8, name: &str) -> String {
        let public_key = line(&key(seed));
        let request =
            AddSshKeyRequest { name: name.into(), public_key, ..AddSshKeyRequest::default() };
        let added = self.lab.operator().add_ssh_key(request).await.expect("added").into_inner();
        added.key.expect("a key").id
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Options of OpenSSH's clients, with a key of this number.
    fn options(&self, seed: u8) -> Vec<String> {
        let file = self.path(&format!("key{seed}"));
        if !file.exists() {
            let text = key(seed).to_openssh(LineEnding::LF).expect("a text");
            std::fs::write(&file, text).expect("written");
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).expect("set");
        }
        let known = self.path("known_hosts");
        let mut options = vec!["-F".to_owned(), "/dev/null".to_owned()];
        for option in [
            format!("IdentityFile={}", file.display()),
            format!("UserKnownHostsFile={}", known.display()),
            format!("Port={}", self.address.port()),
            "IdentitiesOnly=yes".into(),
            "IdentityAgent=none".into(),
            "StrictHostKeyChecking=yes".into(),
            "HostKeyAlias=door".into(),
            "GlobalKnownHostsFile=/dev/null".into(),
            "BatchMode=yes".into(),
            "LogLevel=ERROR".into(),
        ] {
            options.extend(["-o".to_owned(), option]);
        }
        options
    }

    fn client(&self, program: &str, seed: u8) -> Command {
        let mut client = Command::new(program);
        client.args(self.options(seed)).env("LC_TEST", "passed").kill_on_drop(true);
        client.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        client
    }

    /// Prepares `ssh` as a user.
    fn ssh(&self, seed: u8, user: &str) -> Command {
        let mut ssh = self.client("ssh", seed);
        ssh.args(["-l", user, "127.0.0.1"]);
        ssh
    }

    /// Runs a line in the sandbox.
    async fn run(&self, line: &str) -> Output {
        output(self.ssh(1, &self.id).arg(line)).await
    }
}

async fn output(command: &mut Command) -> Output {
    timeout(STEP, command.output()).await.expect("in time").expect("openssh-client is installed")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Connects, says something and reads it back.
async fn echoes<S>(connected: std::io::Result<S>) -> bool
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let Ok(mut stream) = connected else { return false };
    let mut answer = [0; 5];
    stream.write_all(b"hello").await.is_ok()
        && matches!(timeout(STEP, stream.read_exact(&mut answer)).await, Ok(Ok(_)))
        && &answer == b"hello"
}

/// Waits for a client that listens.
async fn until<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) {
    let wait = async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(STEP, wait).await.unwrap_or_else(|_| panic!("{what} in time"));
}

#[tokio::test(flavor = "multi_thread")]
async fn openssh_runs_commands_with_their_outputs_apart_and_their_exit_codes() {
    let door = Door::open().await;
    let ran = door.run("echo out; echo err >&2; exit 7").await;
    assert_eq!(
        (ran.status.code(), text(&ran.stdout), text(&ran.stderr)),
        (Some(7), "out\n".into(), "err\n".into())
    );
    // A signal is told as one; the client ends with 255.
    let killed = door.run("kill -9 $$").await;
    assert_eq!(killed.status.code(), Some(255), "{}", text(&killed.stderr));
    // Bytes of any kind, both ways, and the end of stdin.
    let bytes = counted(FILE_BYTES);
    let mut child = door.ssh(1, &door.id).arg("cat").stdin(Stdio::piped()).spawn().expect("ssh");
    let mut stdin = child.stdin.take().expect("one");
    let sent = bytes.clone();
    let feed = tokio::spawn(async move { stdin.write_all(&sent).await });
    let ended = timeout(STEP, child.wait_with_output()).await.expect("in time").expect("ended");
    feed.await.expect("no panic").expect("sent");
    assert!(ended.status.success() && ended.stdout == bytes, "{} bytes", ended.stdout.len());
    // Only harmless variables are passed on.
    let mut ssh = door.ssh(1, &door.id);
    ssh.args(["-o", "SendEnv=LC_TEST", "-o", "SetEnv=SECRET=x"]).arg("echo $LC_TEST-$SECRET");
    assert_eq!(text(&output(&mut ssh).await.stdout), "passed-\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn sandbox_is_entered_by_its_id_its_vmid_and_its_name() {
    let door = Door::open().await;
    let mut api = door.lab.api();
    let change = Sandbox { id: door.id.clone(), name: "web".into(), ..Sandbox::default() };
    let named = api.update_sandbox(proto::update::request(change, &["name"])).await.expect("named");
    let vmid = named.into_inner().sandbox.expect("a sandbox").vmid.to_string();
    for user in [door.id.as_str(), "web", vmid.as_str()] {
        let ran = output(door.ssh(1, user).arg("echo in")).await;
        assert_eq!(text(&ran.stdout), "in\n", "{user}: {}", text(&ran.stderr));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_go_in_and_out_by_sftp_and_scp() {
    let door = Door::open().await;
    let bytes = counted(FILE_BYTES);
    std::fs::write(door.path("here"), &bytes).expect("written");
    let inside = door.path("inside");
    std::fs::create_dir(&inside).expect("made");
    let place = |name: &str| format!("{}@127.0.0.1:{}/{name}", door.id, inside.display());

    let mut batch = door.client("sftp", 1);
    batch.args(["-q", "-b", "-"]).arg(format!("{}@127.0.0.1", door.id)).stdin(Stdio::piped());
    let mut sftp = batch.spawn().expect("sftp");
    let (here, there) = (door.path("here"), inside.join("put"));
    let lines = format!(
        "put {} {}\nget {} {}\nls -l {}\n",
        here.display(),
        there.display(),
        there.display(),
        door.path("got").display(),
        inside.display(),
    );
    let mut stdin = sftp.stdin.take().expect("one");
    stdin.write_all(lines.as_bytes()).await.expect("sent");
    drop(stdin);
    let ended = timeout(STEP, sftp.wait_with_output()).await.expect("in time").expect("ended");
    assert!(ended.status.success(), "{}", text(&ended.stderr));
    assert!(std::fs::read(&there).expect("put") == bytes);
    assert!(std::fs::read(door.path("got")).expect("got") == bytes);

    let copied = output(door.client("scp", 1).arg(&here).arg(place("copied"))).await;
    assert!(copied.status.success(), "{}", text(&copied.stderr));
    assert!(std::fs::read(inside.join("copied")).expect("there") == bytes);
    let back = output(door.client("scp", 1).arg(place("copied")).arg(door.path("back"))).await;
    assert!(back.status.success(), "{}", text(&back.stderr));
    assert!(std::fs::read(door.path("back")).expect("there") == bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_is_the_same() {
    let door = Door::open().await;
    let blue = token(&door.lab.store, "blue", "sandbox").await;
    let other = create(&mut door.lab.api_as(&blue), request("b1")).await.expect("made").id;
    let removed = door.add(3, "gone").await;
    let request = RemoveSshKeyRequest { key: removed, team: String::new() };
    door.lab.operator().remove_ssh_key(request).await.expect("removed");
    let mut said = Vec::new();
    for (what, seed, user) in [
        ("unknown key", 2, door.id.as_str()),
        ("another team's sandbox", 1, other.as_str()),
        ("no such sandbox", 1, "nobody"),
        ("no name of a sandbox", 1, "a b"),
        ("longer than a name may be", 1, &*"x".repeat(129)),
        ("removed key", 3, door.id.as_str()),
        ("nothing is right", 2, "nobody"),
    ] {
        let begun = Instant::now();
        let refused = output(door.ssh(seed, user).arg("echo in")).await;
        let error = text(&refused.stderr).replace(user, "USER");
        said.push((error, refused.status.code(), refused.stdout));
        assert!(begun.elapsed() >= Duration::from_millis(500), "{what}: it takes its time");
    }
    assert!(said[0].0.contains("Permission denied (publickey)"), "{said:?}");
    assert!(said.iter().all(|one| *one == said[0]), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn offer_of_a_key_tells_nothing_about_names() {
    let door = Door::open().await;
    for (seed, user, is_taken) in
        [(1, door.id.as_str(), true), (1, "nobody", true), (1, "a b", true), (2, "nobody", false)]
    {
        // With -v the client tells how its offer was answered.
        let ran = output(door.ssh(seed, user).args(["-v", "echo in"])).await;
        let said = text(&ran.stderr);
        assert_eq!(said.contains("Server accepts key"), is_taken, "{user}: {said}");
        assert_eq!(ran.status.success(), user == door.id, "{user}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_without_a_login_stop_nobody() {
    let door = Door::open().await;
    let mut idle = Vec::new();
    for _ in 0..100 {
        idle.push(TcpStream::connect(door.address).await.expect("connected"));
    }
    let ran = door.run("echo in").await;
    assert_eq!(text(&ran.stdout), "in\n", "{}", text(&ran.stderr));
    // The first ones have lost their places.
    let mut rest = Vec::new();
    let ended = timeout(STEP, idle[0].read_to_end(&mut rest)).await.expect("in time");
    assert!(ended.is_ok() || ended.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn client_that_does_not_read_or_is_not_read_stops_nobody() {
    let door = Door::open().await;
    // One connection with several sessions.
    let socket = door.path("mux");
    let path = format!("ControlPath={}", socket.display());
    let mut master = door.ssh(1, &door.id);
    let mut master = master.args(["-M", "-N", "-o", &path]).spawn().expect("ssh");
    let waited = timeout(STEP, async {
        while !socket.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    waited.await.expect("connected");
    // A command that reads nothing of its endless stdin, and one whose endless output nobody reads.
    let mut deaf = door.ssh(1, &door.id);
    let zero = std::fs::File::open("/dev/zero").expect("opened");
    let mut deaf =
        deaf.args(["-o", &path]).arg("echo up; sleep 60").stdin(zero).spawn().expect("ssh");
    let mut up = [0; 3];
    let mut out = deaf.stdout.take().expect("one");
    timeout(STEP, out.read_exact(&mut up)).await.expect("in time").expect("read");
    let mut unread = door.ssh(1, &door.id);
    let _unread = unread.args(["-o", &path]).arg("yes").spawn().expect("ssh");
    for _ in 0..20 {
        let ran = output(door.ssh(1, &door.id).args(["-o", &path]).arg("echo in")).await;
        assert_eq!(text(&ran.stdout), "in\n", "{}", text(&ran.stderr));
    }
    // A filter whose output is read gets all of its input, on the same connection.
    let bytes = counted(FILE_BYTES);
    std::fs::write(door.path("in"), &bytes).expect("written");
    let input = std::fs::File::open(door.path("in")).expect("opened");
    let mut filter = door.ssh(1, &door.id);
    let filtered = output(door.ssh(1, &door.id).arg("cat").stdin(input)).await;
    assert!(filtered.stdout == bytes, "another connection goes at full speed");
    let ran = output(filter.args(["-o", &path]).arg("head -c 100000 /dev/zero | wc -c")).await;
    assert_eq!(text(&ran.stdout).trim(), "100000");
    master.kill().await.expect("ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn removal_of_a_key_ends_its_sessions() {
    let door = Door::open().await;
    let id = door.add(4, "short").await;
    let mut child = door.ssh(4, &door.id).arg("echo up; sleep 60").spawn().expect("ssh");
    let mut up = [0; 3];
    child.stdout.as_mut().expect("one").read_exact(&mut up).await.expect("read");
    let mut other = door.ssh(1, &door.id).arg("echo up; sleep 60").spawn().expect("ssh");
    other.stdout.as_mut().expect("one").read_exact(&mut up).await.expect("read");
    let begun = Instant::now();
    let request = RemoveSshKeyRequest { key: "short".into(), team: String::new() };
    let removed = door.lab.operator().remove_ssh_key(request).await.expect("removed").into_inner();
    assert_eq!(removed.key.expect("a key").id, id);
    let ended = timeout(STEP, child.wait_with_output()).await.expect("in time").expect("ended");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert!(
        !ended.status.success() && text(&ended.stderr).contains("removed"),
        "{}",
        text(&ended.stderr)
    );
    assert!(other.try_wait().expect("asked").is_none(), "the other key goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn paused_sandbox_is_woken_where_its_rule_says_so() {
    let door = Door::open().await;
    let mut api = door.lab.api();
    let pause = || PauseSandboxRequest { id: door.id.clone(), or_stop: false };
    let rule = async |ssh: bool| {
        let wake_on = Some(WakeOn { http: false, ssh, exec: true });
        let change = Sandbox { id: door.id.clone(), wake_on, ..Sandbox::default() };
        let request = proto::update::request(change, &["wake_on"]);
        door.lab.api().update_sandbox(request).await.expect("set");
    };
    rule(false).await;
    api.pause_sandbox(pause()).await.expect("paused");
    let refused = door.run("echo in").await;
    assert_eq!(refused.status.code(), Some(255));
    let said = text(&refused.stderr);
    assert!(said.contains("is paused") && said.contains("wake-on"), "{said}");
    rule(true).await;
    let ran = door.run("echo in").await;
    assert_eq!(text(&ran.stdout), "in\n", "{}", text(&ran.stderr));
    assert_eq!(door.lab.get(&door.id).await.expect("there").phase(), Phase::Running);
}

#[tokio::test(start_paused = true)]
async fn keys_are_the_teams_own_and_no_more_than_who_adds_them() {
    let lab = Lab::new().await;
    let as_token =
        |token: &str| OperatorServiceClient::with_interceptor(lab.channel(), bearer(token));
    let [manage, exec, both, blue] = [
        token(&lab.store, "red", "manage").await,
        token(&lab.store, "red", "exec").await,
        token(&lab.store, "red", "exec manage").await,
        token(&lab.store, "blue", "exec manage").await,
    ];
    let add = |team: &str, seed: u8| AddSshKeyRequest {
        team: team.into(),
        name: format!("k{seed}"),
        public_key: line(&key(seed)),
        ..AddSshKeyRequest::default()
    };
    for token in [&manage, &exec] {
        let refused = as_token(token).add_ssh_key(add("", 1)).await;
        assert_eq!(reason(refused), Reason::ScopeMissing);
    }
    let refused = as_token(&blue).add_ssh_key(add("red", 1)).await;
    assert_eq!(reason(refused), Reason::ScopeMissing);
    let added = as_token(&both).add_ssh_key(add("", 1)).await.expect("added").into_inner().key;
    let added = added.expect("a key");
    assert_eq!((added.team.as_str(), added.name.as_str()), ("red", "k1"));
    assert!(added.fingerprint.starts_with("SHA256:") && added.added_by.len() == 12);
    assert_eq!(reason(as_token(&both).add_ssh_key(add("", 1)).await), Reason::NameTaken);
    // Another team may have the same key; each sees its own.
    as_token(&blue).add_ssh_key(add("", 1)).await.expect("added");
    for token in [&both, &blue] {
        let listed = as_token(token).list_ssh_keys(ListSshKeysRequest::default()).await;
        assert_eq!(listed.expect("listed").into_inner().keys.len(), 1);
    }
    // A token's revocation works on keys, too; a key is no token that anybody can send.
    let remove = |named: &str| RemoveSshKeyRequest { key: named.into(), team: String::new() };
    assert_eq!(
        reason(as_token(&blue).remove_ssh_key(remove(&added.id)).await),
        Reason::TokenNotFound
    );
    let gone = as_token(&both).remove_ssh_key(remove(&added.fingerprint)).await.expect("removed");
    assert!(gone.into_inner().key.expect("a key").removed_at.is_some());
    assert_eq!(reason(as_token(&both).remove_ssh_key(remove("k1")).await), Reason::TokenNotFound);
}

#[tokio::test(start_paused = true)]
async fn key_is_added_in_the_name_of_the_callers_own_user() {
    let lab = Lab::new().await;
    let token_of = async |user: &str, scopes: &str| {
        let (team, scopes) = ("red".parse().expect("team"), scopes.parse().expect("scopes"));
        let user = (!user.is_empty()).then(|| user.parse().expect("a user"));
        let order = crate::token::Order { user, ..crate::token::Order::new(team, scopes) };
        let issued = crate::token::issue(order, 1);
        lab.store.add_token(issued.token.clone()).await.expect("stored");
        issued.text(Format::Plain)
    };
    let ada = token_of("ada", "exec manage").await;
    let backend = token_of("", "exec manage").await;
    let operator = token_of("eve", "exec manage admin").await;
    let add = async |token: &str, seed: u8, user: &str| {
        let request = AddSshKeyRequest {
            user: user.into(),
            public_key: line(&key(seed)),
            ..AddSshKeyRequest::default()
        };
        let mut client = OperatorServiceClient::with_interceptor(lab.channel(), bearer(token));
        let added = client.add_ssh_key(request).await?.into_inner();
        Ok::<_, Status>(added.key.expect("a key").user)
    };
    assert_eq!(add(&ada, 1, "").await.expect("added"), "ada");
    assert_eq!(add(&ada, 2, "ada").await.expect("added"), "ada");
    assert_eq!(reason(add(&ada, 3, "bob").await), Reason::ScopeMissing);
    assert_eq!(add(&backend, 4, "bob").await.expect("added"), "bob");
    assert_eq!(add(&operator, 5, "bob").await.expect("added"), "bob");
    assert_eq!(add(&operator, 6, "").await.expect("added"), "");
}
