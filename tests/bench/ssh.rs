//! SSH into a sandbox: files by SFTP beside `cat` through exec, and a login until its prompt beside the same to
//! OpenSSH's server on this machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    time::{sleep, timeout},
};

use crate::{
    figures::{Figures, median},
    world::{World, timed},
};

/// Bytes of the file.
const FILE: usize = 256 * 1024 * 1024;
/// Rounds of steps that take seconds, and of those that take tenths of one.
const TRANSFERS: usize = 3;
const LOGINS: usize = 20;
/// Longest time of one step.
const STEP: Duration = Duration::from_secs(120);
/// File in the sandbox.
const INSIDE: &str = "/root/bench";
const SSHD: &str = "/usr/sbin/sshd";

/// Client with a key of its own, and a sandbox that it may enter.
struct Client<'a> {
    world: &'a World,
    dir: tempfile::TempDir,
    id: &'a str,
}

pub(crate) async fn measure(world: &World, figures: &mut Figures) -> Result<()> {
    let id = world.create("node1").await?;
    let client = Client { world, dir: tempfile::tempdir()?, id: &id };
    make_key(&client.path("key")).await?;
    let public = client.text("key.pub");
    let measured = async {
        client.ctl(&["ssh-key", "add", &public, "--name", &client.key_name()]).await?;
        client.ctl(&["ssh-config", "--write", "--identity", &client.text("key")]).await?;
        client.files(figures).await?;
        client.prompt(figures).await
    };
    let measured = measured.await;
    // The first failure is the one to tell, also where it keeps these from working.
    let removed = client.ctl(&["ssh-key", "rm", &client.key_name()]).await;
    let deleted = world.delete(&id).await;
    measured.and(removed).and(deleted)
}

async fn make_key(file: &Path) -> Result<()> {
    let mut made = Command::new("ssh-keygen");
    run(made.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(file)).await.map(drop)
}

/// Runs a program to its end, which must be a success.
async fn run(command: &mut Command) -> Result<Output> {
    command.kill_on_drop(true);
    let ran = timeout(STEP, command.output()).await.context("it did not end in time")??;
    ensure!(ran.status.success(), "{command:?}: {}", String::from_utf8_lossy(&ran.stderr));
    Ok(ran)
}

impl Client<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn key_name(&self) -> String {
        format!("bench-{}", self.id)
    }

    fn sandboxctl(&self, args: &[&str]) -> Command {
        let mut command = self.world.sandboxctl(args);
        command.env("HOME", self.dir.path());
        command
    }

    async fn ctl(&self, args: &[&str]) -> Result<()> {
        run(&mut self.sandboxctl(args)).await.map(drop)
    }

    /// Prepares one of OpenSSH's clients for the sandbox.
    fn client(&self, program: &str) -> Result<Command> {
        let files = fs::read_dir(self.path(".ssh/sandboxctl"))?;
        let config = files
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|ext| ext == "conf"));
        let mut client = Command::new(program);
        client.arg("-F").arg(config.context("a configuration")?);
        client.args(["-o", "BatchMode=yes", "-o", "IdentityAgent=none"]).stdin(Stdio::null());
        Ok(client)
    }

    /// Measures a file in both directions.
    async fn files(&self, figures: &mut Figures) -> Result<()> {
        let (here, back) = (self.path("here"), self.path("back"));
        // What compresses well is no advantage: nothing on the way compresses.
        fs::write(&here, vec![b'x'; FILE])?;
        let (mut put, mut fed, mut got, mut read) = (vec![], vec![], vec![], vec![]);
        for round in 0..TRANSFERS {
            eprintln!("sftp, round {} of {TRANSFERS}", round + 1);
            put.push(self.sftp(&format!("put {} {INSIDE}", here.display())).await?);
            let line = format!("cat > {INSIDE}-2");
            let mut feed = self.sandboxctl(&["exec", "-i", self.id, "--", "sh", "-c", &line]);
            feed.stdin(fs::File::open(&here)?);
            let (took, ran) = timed(run(&mut feed)).await;
            ran?;
            fed.push(took);
            got.push(self.sftp(&format!("get {INSIDE} {}", back.display())).await?);
            ensure!(fs::metadata(&back)?.len() == FILE as u64, "bytes were lost");
            let mut cat = self.sandboxctl(&["exec", self.id, "--", "cat", &format!("{INSIDE}-2")]);
            cat.stdin(Stdio::null()).stdout(fs::File::create(&back)?);
            let (took, ran) = timed(run_apart(&mut cat)).await;
            ran?;
            read.push(took);
            ensure!(fs::metadata(&back)?.len() == FILE as u64, "bytes were lost");
        }
        #[expect(clippy::cast_precision_loss, reason = "256 MiB")]
        let rate = |times: &mut [f64]| FILE as f64 / 1e6 / (median(times) / 1000.0);
        let against = "cat through sandboxctl exec";
        figures.add("sftp_put_MBps", rate(&mut put), "MB/s", against, rate(&mut fed));
        figures.add("sftp_get_MBps", rate(&mut got), "MB/s", against, rate(&mut read));
        Ok(())
    }

    async fn sftp(&self, line: &str) -> Result<f64> {
        fs::write(self.path("batch"), format!("{line}\n"))?;
        let mut sftp = self.client("sftp")?;
        sftp.arg("-q").arg("-b").arg(self.path("batch")).arg(self.id);
        let (took, ran) = timed(run(&mut sftp)).await;
        ran.map(|_| took)
    }

    /// Measures a login until the first byte of the prompt.
    async fn prompt(&self, figures: &mut Figures) -> Result<()> {
        let sshd = Sshd::start(self.dir.path()).await?;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..LOGINS {
            ours.push(first_byte(self.client("ssh")?.args(["-tt", self.id])).await?);
            theirs.push(first_byte(&mut sshd.ssh(&self.path("key"))).await?);
        }
        let (ours, theirs) = (median(&mut ours), median(&mut theirs));
        figures.add("ssh_prompt", ours, "ms", "OpenSSH's sshd, same machine", theirs);
        figures.bounds("ssh", &[("time to the prompt, ms", ours, theirs)]);
        Ok(())
    }
}

/// Runs a program whose output goes elsewhere.
async fn run_apart(command: &mut Command) -> Result<()> {
    let status = timeout(STEP, command.kill_on_drop(true).status()).await;
    ensure!(status.context("it did not end in time")??.success(), "{command:?} failed");
    Ok(())
}

/// Time from the start of a client until its first output, ms.
async fn first_byte(ssh: &mut Command) -> Result<f64> {
    let (took, spawned) = timed(async {
        let mut child = ssh
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let out = child.stdout.as_mut().context("stdout")?;
        timeout(STEP, out.read_u8()).await.context("no prompt came")??;
        anyhow::Ok(child)
    })
    .await;
    let mut child = spawned?;
    if let Some(stdin) = &mut child.stdin {
        stdin.write_all(b"exit\n").await?;
    }
    let mut rest = Vec::new();
    if let Some(out) = &mut child.stdout {
        timeout(STEP, out.read_to_end(&mut rest)).await??;
    }
    timeout(STEP, child.wait()).await??;
    Ok(took)
}

/// OpenSSH's server for root of this machine, with a configuration and a host key of its own.
struct Sshd {
    port: u16,
    known_hosts: PathBuf,
    _server: Child,
}

impl Sshd {
    async fn start(dir: &Path) -> Result<Self> {
        ensure!(Path::new(SSHD).exists(), "{SSHD} is missing: `make bench` installs it");
        // Where its unprivileged part is confined.
        fs::create_dir_all("/run/sshd")?;
        let free = TcpListener::bind("127.0.0.1:0").await?;
        let port = free.local_addr()?.port();
        drop(free);
        let file = |name: &str| dir.join(name);
        make_key(&file("host")).await?;
        let known_hosts = file("known_hosts");
        let host = fs::read_to_string(file("host.pub"))?;
        fs::write(&known_hosts, format!("bench-sshd {host}"))?;
        let config = format!(
            "ListenAddress 127.0.0.1\nPort {port}\nHostKey {}\nPidFile none\nAuthorizedKeysFile {}\n\
             StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n\
             PrintMotd no\nPrintLastLog no\nUseDNS no\n",
            file("host").display(),
            file("key.pub").display(),
        );
        fs::write(file("sshd_config"), config)?;
        let mut server = Command::new(SSHD);
        server.arg("-D").arg("-e").arg("-f").arg(file("sshd_config")).kill_on_drop(true);
        let server = server.stdin(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let listens = async {
            while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(Duration::from_secs(10), listens).await.context("sshd does not listen")?;
        Ok(Self { port, known_hosts, _server: server })
    }

    /// Prepares a client with the options that the one for the sandbox has.
    fn ssh(&self, key: &Path) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "/dev/null", "-tt", "-l", "root", "127.0.0.1"]);
        for option in [
            format!("Port={}", self.port),
            format!("IdentityFile={}", key.display()),
            format!("UserKnownHostsFile={}", self.known_hosts.display()),
            "HostKeyAlias=bench-sshd".to_owned(),
            "StrictHostKeyChecking=yes".to_owned(),
            "IdentitiesOnly=yes".to_owned(),
            "BatchMode=yes".to_owned(),
            "IdentityAgent=none".to_owned(),
        ] {
            ssh.args(["-o", &option]);
        }
        ssh
    }
}
