//! SSH into real sandboxes, with OpenSSH's own clients: commands, files, terminals and forwards, and a session
//! that an agent's restart does not end.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use lab::{daemons::AGENT, image::TOOLS};
use nix::{
    pty::{OpenptyResult, Winsize, openpty},
    unistd::ttyname,
};

use crate::{
    login::Key,
    world::{PATIENCE, World, id, node, unique, wait, world},
};

/// Client with a key of its own, and a sandbox that it may enter.
struct Client<'a> {
    world: &'a World,
    key: Key,
    name: String,
}

impl<'a> Client<'a> {
    fn new(world: &'a World, more: &[&str]) -> (Self, serde_json::Value) {
        let name = unique("ssh");
        let sandbox = world.create(&[&["--name", &name], more].concat());
        let client = Self { world, key: Key::new(world), name };
        client.ctl(&["ssh-config", "--write", "--identity", &client.key.file().to_string_lossy()]);
        (client, sandbox)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.key.home().join(name)
    }

    fn ctl(&self, args: &[&str]) -> String {
        let ran = self.world.command(args).env("HOME", self.key.home()).output().expect("it runs");
        assert!(ran.status.success(), "{args:?}: {}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8_lossy(&ran.stdout).into_owned()
    }

    /// Returns the options by which OpenSSH's clients use the written configuration.
    fn options(&self) -> Vec<String> {
        let dir = fs::read_dir(self.path(".ssh/sandboxctl")).expect("written");
        let mut files = dir.map(|entry| entry.expect("an entry").path());
        let config = files.find(|path| path.extension().is_some_and(|ext| ext == "conf"));
        let config = config.expect("a configuration").display().to_string();
        let options = ["-F", &config, "-o", "BatchMode=yes", "-o", "IdentityAgent=none"];
        options.map(str::to_owned).into()
    }

    /// Prepares one of OpenSSH's clients with the written configuration.
    fn client(&self, program: &str) -> Command {
        let mut client = Command::new(program);
        client.args(self.options()).stdin(Stdio::null());
        client
    }

    fn run(&self, line: &str) -> Output {
        bounded("ssh").args(self.options()).args([&self.name, line]).output().expect("it runs")
    }

    #[track_caller]
    fn says(&self, line: &str) -> String {
        let ran = self.run(line);
        assert!(ran.status.success(), "{line}: {}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8_lossy(&ran.stdout).trim().to_owned()
    }
}

/// Prepares a program that is ended when it takes too long; its exit code is 124 then.
fn bounded(program: &str) -> Command {
    let mut command = Command::new("timeout");
    command.arg(PATIENCE.as_secs().to_string()).arg(program).stdin(Stdio::null());
    command
}

/// Program that is ended with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Fails where it has ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn digest(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split(' ').next().expect("a digest").to_owned()
}

#[test]
fn openssh_enters_a_sandbox_that_has_no_server() {
    let Some(world) = world() else { return };
    let (client, _) = Client::new(&world, &[]);
    assert_eq!(client.says("id -un; pwd"), "root\n/root");
    assert_eq!(client.says("pgrep -c sshd || true"), "0");
    let ran = client.run("echo out; echo err >&2; exit 7");
    assert_eq!((ran.status.code(), ran.stdout.as_slice()), (Some(7), &b"out\n"[..]));
    assert!(String::from_utf8_lossy(&ran.stderr).contains("err"));
    // A terminal with the size and the kind that the client has.
    let shell = client.client("ssh").args(["-tt", &client.name, "test -t 0 && tty"]).output();
    let tty = shell.expect("it runs");
    assert!(String::from_utf8_lossy(&tty.stdout).starts_with("/dev/pts/"), "{tty:?}");

    let key = client.key.file();
    let verb =
        ["ssh", "--identity", &key.to_string_lossy(), &client.name, "--", "-o", "BatchMode=yes"];
    let mut verb = world.command(&verb);
    let ran = verb.env("HOME", client.key.home()).arg("exit 7").stdin(Stdio::null()).status();
    assert_eq!(ran.expect("it runs").code(), Some(7), "by sandboxctl ssh");

    // Files both ways, and what sftp does to them.
    let (here, back) = (client.path("here"), client.path("back"));
    let bytes: Vec<u8> = (0..20_000_003u32).map(|n| (n % 251) as u8 ^ (n >> 13) as u8).collect();
    fs::write(&here, &bytes).expect("written");
    let place = format!("{}:/root/there", client.name);
    assert!(client.client("scp").arg(&here).arg(&place).status().expect("it runs").success());
    assert_eq!(client.says("sha256sum < /root/there").split(' ').next(), Some(&*digest(&here)));
    assert!(client.client("scp").arg(&place).arg(&back).status().expect("it runs").success());
    assert_eq!(digest(&back), digest(&here));
    let batch = client.path("batch");
    fs::write(
        &batch,
        "mkdir /tmp/d\nrename /root/there /tmp/d/x\nchmod 600 /tmp/d/x\nls -l /tmp/d\n",
    )
    .expect("written");
    let ran = client.client("sftp").arg("-b").arg(&batch).arg(&client.name).output();
    let ran = ran.expect("it runs");
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    assert_eq!(client.says("stat -c %a-%s /tmp/d/x"), format!("600-{}", bytes.len()));
    drop(client);
    world.finish();
}

#[test]
fn ssh_forwards_to_ports_and_sockets_of_the_sandbox() {
    let Some(world) = world() else { return };
    let (client, _) = Client::new(&world, &["--snapshot", TOOLS.snapshot]);
    // On 127.0.0.1 alone: only a forward reaches it.
    let serve = "cd /root && echo hello > f && \
                 (setsid python3 -m http.server -b 127.0.0.1 8123 >/dev/null 2>&1 </dev/null &)";
    client.says(serve);
    wait("the server", || {
        let port = client.client("ssh").args(["-W", "localhost:8123", &client.name]).output();
        port.is_ok_and(|ran| ran.status.success())
    });
    let mut forward = client.client("ssh");
    let forward = forward.args(["-N", "-L", "18123:localhost:8123", &client.name]).spawn();
    let mut forward = forward.expect("it runs");
    let got = || {
        let ran = Command::new("curl").args(["-s", "http://127.0.0.1:18123/f"]).output();
        ran.map(|ran| ran.stdout).unwrap_or_default()
    };
    wait("the forward", || got() == b"hello\n");
    forward.kill().expect("ended");
    forward.wait().expect("ended");
    let socket = "import socket as s;l=s.socket(s.AF_UNIX);l.bind('/root/s');l.listen();\
                  c,_=l.accept();c.sendall(c.recv(99).upper())";
    client.says(&format!("(setsid python3 -c \"{socket}\" >/dev/null 2>&1 </dev/null &)"));
    wait("the socket", || client.run("test -S /root/s").status.success());
    let near = client.path("near");
    let mut forward = client.client("ssh");
    let forward = forward.arg("-N").arg("-L").arg(format!("{}:/root/s", near.display()));
    let mut forward = forward.arg(&client.name).spawn().expect("it runs");
    wait("the forward", || near.exists());
    let mut stream = std::os::unix::net::UnixStream::connect(&near).expect("connected");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    std::io::Write::write_all(&mut stream, b"quiet").expect("sent");
    let mut answer = [0; 5];
    std::io::Read::read_exact(&mut stream, &mut answer).expect("answered");
    assert_eq!(&answer, b"QUIET");
    forward.kill().expect("ended");
    forward.wait().expect("ended");
    let far = client.client("ssh").args(["-W", "1.1.1.1:53", &client.name]).output();
    assert!(!far.expect("it runs").status.success(), "another host is refused");
    drop(client);
    world.finish();
}

#[test]
fn rsync_copies_what_differs_both_ways() {
    let Some(world) = world() else { return };
    let (client, _) = Client::new(&world, &["--snapshot", TOOLS.snapshot]);
    let (here, back) = (client.path("here"), client.path("back"));
    fs::create_dir_all(here.join("deep/er")).expect("made");
    fs::write(here.join("deep/er/large"), vec![7; 5_000_000]).expect("written");
    fs::write(here.join("run.sh"), "#!/bin/sh\n").expect("written");
    std::os::unix::fs::symlink("deep/er", here.join("link")).expect("made");
    let shell = format!("ssh {}", client.options().join(" "));
    let (local, inside) = (format!("{}/", here.display()), format!("{}:/root/copy/", client.name));
    let rsync = |from: &str, to: &str| {
        let ran = bounded("rsync").args(["-a", "-i", "-e", &shell, from, to]).output();
        let ran = ran.expect("it runs");
        assert!(ran.status.success(), "{ran:?}");
        String::from_utf8_lossy(&ran.stdout).into_owned()
    };
    assert!(rsync(&local, &inside).contains("deep/er/large"));
    assert_eq!(rsync(&local, &inside), "", "nothing differs any more");
    client.says("echo more >> /root/copy/run.sh");
    rsync(&inside, &format!("{}/", back.display()));
    assert_eq!(fs::read_to_string(back.join("run.sh")).expect("copied"), "#!/bin/sh\nmore\n");
    assert_eq!(digest(&back.join("link/large")), digest(&here.join("deep/er/large")));
    drop(client);
    world.finish();
}

#[test]
fn ssh_forwards_back_to_a_server_beside_the_client() {
    let Some(world) = world() else { return };
    let (client, _) = Client::new(&world, &["--snapshot", TOOLS.snapshot]);
    let here = TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = here.local_addr().expect("bound").port();
    let serving = thread::spawn(move || {
        for _ in 0..3 {
            let (mut stream, _) = here.accept().expect("connected");
            stream.set_read_timeout(Some(PATIENCE)).expect("set");
            let mut name = String::new();
            stream.read_to_string(&mut name).expect("an end");
            stream.write_all(format!("hello {name}").as_bytes()).expect("sent");
        }
    });
    let forward = format!("8124:127.0.0.1:{port}");
    let reverse = ["-N", "-o", "ExitOnForwardFailure=yes", "-R", &forward, &client.name];
    let back = Running(client.client("ssh").args(reverse).spawn().expect("it runs"));
    // The exit code of grep, which is 1 without such a line; ssh itself fails with another.
    let listens = || client.run("grep -q ':1FBC .* 0A ' /proc/net/tcp").status.code();
    wait("the listener", || listens() == Some(0));
    let line = "python3 -c 'import socket; s=socket.create_connection((\"127.0.0.1\", 8124)); \
                s.sendall(b\"ada\"); s.shutdown(1); print(s.recv(99, socket.MSG_WAITALL).decode())'";
    for _ in 0..3 {
        assert_eq!(client.says(line), "hello ada");
    }
    serving.join().expect("no panic");
    let second = bounded("ssh").args(client.options()).args(reverse).output().expect("it runs");
    let why = String::from_utf8_lossy(&second.stderr);
    assert!(why.contains("remote port forwarding failed"), "the port is taken: {second:?}");
    drop(back);
    wait("the end of the listener", || listens() == Some(1));
    drop(client);
    world.finish();
}

/// SSH client on a terminal of its own, whose command answers each line that is typed.
struct Terminal {
    path: PathBuf,
    keys: fs::File,
    heard: mpsc::Receiver<String>,
    /// Number of the last line that was typed.
    typed: u32,
    /// Lines that answered nothing.
    unasked: Vec<String>,
    _ssh: Running,
}

impl Terminal {
    /// Runs a line in the sandbox, and after it what answers. Returns the size that the terminal had at first.
    fn open(client: &Client, line: &str) -> (Self, String) {
        let size = Winsize { ws_row: 30, ws_col: 90, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(&size, None).expect("a terminal");
        let path = ttyname(&slave).expect("a path");
        // The terminal is its own, so that it is signalled when the size changes.
        let mut ssh = Command::new("setsid");
        ssh.args(["--ctty", "ssh"]).args(client.options()).args(["-tt", &client.name]);
        let answers = "while read -r line; do echo \"got $line $(stty size)\"; done";
        ssh.arg(format!("stty -echo; stty size; {line} {answers}"));
        let mut ssh = Running(ssh.stdin(slave).stdout(Stdio::piped()).spawn().expect("it runs"));
        let said = BufReader::new(ssh.0.stdout.take().expect("one")).lines();
        let (lines, heard) = mpsc::channel();
        // Ends with the client: nobody else has the other end of its output.
        thread::spawn(move || said.map_while(Result::ok).try_for_each(|line| lines.send(line)));
        let keys = fs::File::from(master);
        let this = Self { path, keys, heard, typed: 0, unasked: Vec::new(), _ssh: ssh };
        let first = this.next();
        (this, first)
    }

    fn next(&self) -> String {
        self.heard.recv_timeout(PATIENCE).expect("a line").trim().to_owned()
    }

    /// Types a line that no other is like.
    fn press(&mut self) {
        self.typed += 1;
        writeln!(self.keys, "{}", self.typed).expect("typed");
    }

    /// Returns the size in the answer to the last line.
    fn answer(&mut self) -> String {
        let expected = format!("got {} ", self.typed);
        loop {
            let line = self.next();
            if let Some(size) = line.strip_prefix(&expected) {
                return size.to_owned();
            }
            self.unasked.push(line);
        }
    }

    fn ask(&mut self) -> String {
        self.press();
        self.answer()
    }

    fn resize(&self, rows: &str, columns: &str) {
        let mut resize = Command::new("stty");
        resize.arg("-F").arg(&self.path).args(["rows", rows, "cols", columns]);
        assert!(resize.status().expect("it runs").success());
    }
}

#[test]
fn terminal_follows_the_window_of_the_client() {
    let Some(world) = world() else { return };
    let (client, _) = Client::new(&world, &[]);
    let (mut terminal, size) = Terminal::open(&client, "");
    assert_eq!(size, "30 90");
    terminal.resize("33", "101");
    wait("the size", || terminal.ask() == "33 101");
    drop(terminal);
    drop(client);
    world.finish();
}

#[test]
fn terminal_goes_on_while_the_agent_is_killed_and_started_again() {
    let Some(world) = world() else { return };
    let (client, sandbox) = Client::new(&world, &[]);
    // It writes before, while and after the agent is away.
    let counts = "(for i in $(seq 1 300); do echo $i; sleep 0.05; done) &";
    let (mut terminal, size) = Terminal::open(&client, counts);
    assert_eq!(size, "30 90");
    assert_eq!(terminal.ask(), "30 90");
    wait("some output", || {
        terminal.ask();
        terminal.unasked.len() > 20
    });
    let services = world.node(node(&sandbox)).services().expect("services");
    services.kill(AGENT, true, PATIENCE).expect("killed");
    // Nobody takes it now.
    terminal.press();
    terminal.resize("33", "101");
    services.start(AGENT, PATIENCE).expect("started");
    terminal.answer();
    wait("the size", || terminal.ask() == "33 101");
    terminal.resize("25", "80");
    wait("the size after that", || terminal.ask() == "25 80");
    while terminal.unasked.last().is_none_or(|line| line != "300") {
        let line = terminal.next();
        terminal.unasked.push(line);
    }
    // An answer that came twice would be among them.
    let all: Vec<_> = (1..=300).map(|number| number.to_string()).collect();
    assert_eq!(terminal.unasked, all, "nothing is lost, and nothing comes twice");
    drop(terminal);
    drop(client);
    world.finish();
}

#[test]
fn ssh_session_goes_on_while_the_agent_is_killed_and_wakes_by_its_rule() {
    let Some(world) = world() else { return };
    let (client, sandbox) = Client::new(&world, &[]);
    let line = "for i in $(seq 1 200); do echo $i; sleep 0.05; done";
    let child = client.client("ssh").args([&client.name, line]).stdout(Stdio::piped()).spawn();
    let child = child.expect("it runs");
    wait("the command", || world.ctl(&["ps", id(&sandbox)]).text().contains("seq 1 200"));
    let services = world.node(node(&sandbox)).services().expect("services");
    services.kill(AGENT, false, Duration::from_secs(30)).expect("killed");
    let ran = child.wait_with_output().expect("ended");
    let numbers: String = (1..=200).map(|n| format!("{n}\n")).collect();
    assert!(ran.status.success() && ran.stdout == numbers.as_bytes(), "{} bytes", ran.stdout.len());

    assert_eq!(world.ctl(&["wake-on", id(&sandbox), "--ssh", "off"]).code, 0);
    assert_eq!(world.ctl(&["pause", id(&sandbox)]).code, 0);
    let refused = client.run("true");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is paused"), "{refused:?}");
    assert_eq!(world.ctl(&["wake-on", id(&sandbox), "--ssh", "on"]).code, 0);
    assert_eq!(client.says("echo awake"), "awake");

    // The end of the key is the end of its sessions.
    let child = client.client("ssh").args([&client.name, "sleep 60"]).spawn();
    let mut child = child.expect("it runs");
    wait("the command", || world.ctl(&["ps", id(&sandbox)]).text().contains("sleep 60"));
    assert_eq!(world.ctl(&["ssh-key", "rm", client.key.name()]).code, 0);
    wait("the end of the session", || child.try_wait().expect("asked").is_some());
    assert!(!client.run("true").status.success());
    drop(client);
    world.finish();
}

#[test]
fn dropped_connection_ends_the_foreground_and_spares_the_background() {
    let Some(world) = world() else { return };
    let (client, sandbox) = Client::new(&world, &[]);
    let count = |sleep: &str| client.says(&format!("pgrep -c -x -f 'sleep {sleep}' || true"));
    let runs = |line: &str| {
        let all = world.json(&["ps", id(&sandbox)]);
        let is_it = |exec: &serde_json::Value| exec["command"] == line && exec["lost"].is_null();
        all.as_array().expect("a list").iter().any(is_it)
    };
    // On pipes, and on a terminal.
    for (options, number) in [(&[][..], "471"), (&["-tt"][..], "472")] {
        let line = format!(
            "setsid sleep {number}1 & nohup sleep {number}2 >/dev/null 2>&1 & \
             sleep {number}3 & sleep {number}4; true"
        );
        let ssh = client.client("ssh").args(options).args([&client.name, &line]).spawn();
        let mut ssh = ssh.expect("it runs");
        wait("the processes", || count(&format!("{number}[1-4]")) == "4");
        assert!(runs(&line), "{options:?}");
        // Killed, it says nothing to the server: the connection breaks.
        ssh.kill().expect("killed");
        ssh.wait().expect("ended");
        wait("the end of the command", || !runs(&line));
        assert_eq!(count(&format!("{number}[34]")), "0", "{options:?}");
        assert_eq!(count(&format!("{number}[12]")), "2", "{options:?}");
    }
    drop(client);
    world.finish();
}
