//! The controller's process and its resource usage from the kernel.

use std::{
    fmt::Write as _,
    fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use proto::name::NodeName;

use super::caller::Caller;

/// Ticks of /proc/PID/stat per second.
const TICKS: f64 = 100.0;

/// The shipped controller on a data directory.
pub(super) struct Process {
    dir: PathBuf,
    program: PathBuf,
    address: SocketAddr,
    child: Child,
}

impl Process {
    /// Configures the controller for these nodes and starts it.
    pub(super) fn start(dir: &Path, nodes: &[(NodeName, SocketAddr)]) -> Result<Self> {
        let program = std::env::current_exe()?.with_file_name("pve-sandbox-controller");
        // Free a moment ago; no other process takes ports here.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut config = format!(
            "listen = \"{address}\"\ndata_dir = \"{}\"\nurl_template = \"http://{{port}}-{{id}}.test\"\n",
            dir.display()
        );
        for (name, address) in nodes {
            write!(config, "[[node]]\nname = \"{name}\"\naddress = \"{address}\"\n")?;
        }
        fs::write(dir.join("controller.toml"), config)?;
        let child = spawn(&program, dir)?;
        Ok(Self { dir: dir.to_owned(), program, address, child })
    }

    /// Opens `connections` connections with a token.
    pub(super) fn callers(&self, connections: usize) -> Result<Vec<Caller>> {
        let token: Arc<str> = self.token()?.into();
        let tls = daemon::tls::client_with_roots(&self.ca())?;
        let connect = |_| {
            let (address, tls) = (self.address.to_string(), tls.clone());
            let channel = daemon::channel::tls(daemon::flow::Leg::Api, &address, "localhost", tls)?;
            Ok(Caller::new(channel, token.clone()))
        };
        (0..connections).map(connect).collect()
    }

    /// Runs `sandboxctl get` so many times, and returns the CPU time of one run in milliseconds.
    pub(super) fn get_cpu_ms(&self, id: &str, runs: u32) -> Result<f64> {
        let mut command = Command::new(self.program.with_file_name("sandboxctl"));
        command
            .args(["get", id])
            .env("SANDBOXCTL_ENDPOINT", format!("https://localhost:{}", self.address.port()))
            .env("SANDBOXCTL_TOKEN", self.token()?)
            .env("SANDBOXCTL_CA", self.ca());
        let before = children_cpu_s()?;
        for _ in 0..runs {
            let got = command.output().context("sandboxctl does not start: is it built?")?;
            ensure!(got.status.success(), "{}", String::from_utf8_lossy(&got.stderr));
        }
        Ok((children_cpu_s()? - before) * 1000.0 / f64::from(runs))
    }

    fn ca(&self) -> PathBuf {
        self.dir.join("ca/ca.crt")
    }

    /// Creates a token.
    fn token(&self) -> Result<String> {
        let made = Command::new(&self.program)
            .args(["token", "create", "--team", "fleet", "--scope", "operator", "--data-dir"])
            .arg(&self.dir)
            .output()?;
        ensure!(made.status.success(), "no token: {}", String::from_utf8_lossy(&made.stderr));
        Ok(String::from_utf8(made.stdout)?.trim().to_owned())
    }

    /// Kills the process with SIGKILL.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop).context("it ended")
    }

    /// Starts the process again.
    pub(super) fn again(&mut self) -> Result<()> {
        self.child = spawn(&self.program, &self.dir)?;
        Ok(())
    }

    /// Waits until `nodes` nodes are up and `known` is reported as running.
    pub(super) async fn until_up(
        &mut self,
        caller: &Caller,
        nodes: usize,
        known: Option<&str>,
    ) -> Result<()> {
        let up = caller.until_up(nodes, known).await;
        let ended = self.child.try_wait()?;
        ensure!(ended.is_none(), "the controller has ended: {ended:?}");
        up
    }

    /// Returns the resident memory (VmRSS).
    pub(super) fn rss_bytes(&self) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()).context("VmRSS")?;
        Ok(kib.parse::<f64>()? * 1024.0)
    }

    /// Returns the CPU time in seconds.
    pub(super) fn cpu_s(&self) -> Result<f64> {
        cpu_s(self.child.id())
    }
}

/// Returns the CPU time of a process in seconds, user and system.
pub(super) fn cpu_s(pid: u32) -> Result<f64> {
    stat_s(pid, 11)
}

/// Returns the CPU time of our children that have ended, in seconds.
fn children_cpu_s() -> Result<f64> {
    stat_s(std::process::id(), 13)
}

/// Adds two fields of /proc/PID/stat, counted after the name.
fn stat_s(pid: u32, first: usize) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold spaces.
    let (_, fields) = stat.rsplit_once(')').context("a name")?;
    let ticks = fields.split_whitespace().skip(first).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / TICKS)
}

fn spawn(program: &Path, dir: &Path) -> Result<Child> {
    let log = fs::File::options().append(true).create(true).open(dir.join("controller.log"))?;
    Command::new(program)
        .args(["run", "--config"])
        .arg(dir.join("controller.toml"))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("{} does not start: is it built?", program.display()))
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("the controller lives on: {error}");
        }
    }
}
