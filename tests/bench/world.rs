//! The lab as a backend sees it: the controller's API with a token, and the agents' API as the
//! controller uses it.

use std::{
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use daemon::{flow::Leg, tls::Identity};
use lab::{Lab, layout::HUB_IP};
use proto::{
    agent::v1::{self as agent, agent_service_client::AgentServiceClient},
    sandbox::v1::{
        Argv, CreateSandboxRequest, DeleteSandboxRequest, ExecRequest, ExecStart,
        GetSandboxRequest, ListSandboxesRequest, Phase, Sandbox, Size, exec_request, exec_response,
        exec_start, sandbox_service_client::SandboxServiceClient,
    },
};
use tonic::{Request, metadata::MetadataValue, transport::Channel};

/// Id of node1's template.
pub(crate) const SNAPSHOT_TEMPLATE: u32 = 9000;
/// Longest wait until a sandbox is up or gone.
const PATIENCE: Duration = Duration::from_secs(180);

#[derive(Clone)]
pub(crate) struct World {
    pub(crate) lab: Lab,
    api: SandboxServiceClient<Channel>,
    token: String,
}

impl World {
    pub(crate) fn open() -> Result<Self> {
        let lab = Lab::open(Lab::default_dir())?;
        ensure!(lab.is_up(), "no lab is up: `make bench` sees to that");
        Self::of_team(lab, "SANDBOXCTL_TOKEN")
    }

    /// Connects with the token in that variable of the lab's `env`.
    fn of_team(lab: Lab, variable: &str) -> Result<Self> {
        let env = std::fs::read_to_string(lab.layout().dir().join("env")).context("env")?;
        let token = env
            .lines()
            .find_map(|line| line.strip_prefix(&format!("export {variable}=")))
            .with_context(|| format!("{variable} in target/lab/env"))?;
        let token = token.trim_matches('\'').to_owned();
        Ok(Self { api: connect(&lab)?, lab, token })
    }

    /// Returns the same lab as another team sees it.
    pub(crate) fn other_team(&self) -> Result<Self> {
        Self::of_team(self.lab.clone(), "LAB_OTHER_TEAM_TOKEN")
    }

    /// Opens a connection of its own to the controller.
    pub(crate) fn client(&self) -> Result<SandboxServiceClient<Channel>> {
        connect(&self.lab)
    }

    /// Returns the path of the results.
    pub(crate) fn results(&self) -> PathBuf {
        self.lab.layout().dir().join("../bench/results.json")
    }

    pub(crate) fn authorised<T>(&self, message: T) -> Result<Request<T>> {
        let mut request = Request::new(message);
        let value = MetadataValue::try_from(format!("Bearer {}", self.token))?;
        request.metadata_mut().insert("authorization", value);
        Ok(request)
    }

    /// Creates a sandbox on that node, or anywhere if it is empty; returns when it runs.
    pub(crate) async fn create(&self, node: &str) -> Result<String> {
        let mut random = [0u8; 8];
        getrandom::fill(&mut random).map_err(|error| anyhow::anyhow!("randomness: {error}"))?;
        let message = CreateSandboxRequest {
            request_id: format!("bench-{}", u64::from_le_bytes(random)),
            snapshot_id: lab::image::MINIMAL.snapshot.into(),
            node: node.into(),
            // Small, so that a node has room for all of them.
            size: Some(Size { cpu_cores: 0, memory_mib: 128, disk_gib: 0 }),
            ..CreateSandboxRequest::default()
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            // A repeated request is for the same sandbox and continues to wait.
            let answer = self.api.clone().create_sandbox(self.authorised(message.clone())?).await?;
            let sandbox = answer.into_inner().sandbox.context("a sandbox")?;
            let phase = sandbox.phase();
            if phase == Phase::Running {
                return Ok(sandbox.id);
            }
            let waiting = phase == Phase::Creating && Instant::now() < deadline;
            ensure!(waiting, "{} is {phase:?}: {:?}", sandbox.id, sandbox.failure);
        }
    }

    pub(crate) async fn get(&self, id: &str) -> Result<Sandbox> {
        let request = self.authorised(GetSandboxRequest { id: id.into() })?;
        self.api.clone().get_sandbox(request).await?.into_inner().sandbox.context("a sandbox")
    }

    pub(crate) async fn delete(&self, id: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let request = self.authorised(DeleteSandboxRequest { id: id.into() })?;
            let answer = self.api.clone().delete_sandbox(request).await?.into_inner();
            if answer.sandbox.context("a sandbox")?.phase() == Phase::Deleted {
                return Ok(());
            }
        }
        bail!("{id} was not deleted in time")
    }

    /// Runs `true` in a sandbox through the controller, and returns its exit code.
    pub(crate) async fn exec_true(&self, id: &str) -> Result<u32> {
        let sent = tokio_stream::iter(
            true_messages(id).map(|message| ExecRequest { message: Some(message) }),
        );
        let mut answers = self.api.clone().exec(self.authorised(sent)?).await?.into_inner();
        while let Some(answer) = answers.message().await? {
            if let Some(exec_response::Message::Exit(exit)) = answer.message {
                return Ok(exit.code);
            }
        }
        bail!("the stream ended without an exit")
    }

    /// Runs the lab's `sandboxctl`.
    pub(crate) async fn cli(&self, args: &[&str]) -> Result<ExitStatus> {
        let mut command = self.sandboxctl(args);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.status().await.context("sandboxctl does not start")
    }

    /// Prepares the lab's `sandboxctl`.
    pub(crate) fn sandboxctl(&self, args: &[&str]) -> tokio::process::Command {
        let dir = self.lab.layout().dir();
        let mut command = tokio::process::Command::new(dir.join("bin/sandboxctl"));
        command
            .args(args)
            .env("SANDBOXCTL_ENDPOINT", format!("https://{}", api_address()))
            .env("SANDBOXCTL_CA", dir.join("controller/ca/ca.crt"))
            .env("SANDBOXCTL_TOKEN", &self.token);
        command
    }

    /// Returns the number of sandboxes on a node.
    pub(crate) async fn count(&self, node: &str) -> Result<usize> {
        let request = ListSandboxesRequest { page_size: 1000, ..Default::default() };
        let page = self.api.clone().list_sandboxes(self.authorised(request)?).await?.into_inner();
        Ok(page.sandboxes.iter().filter(|sandbox| sandbox.node == node).count())
    }

    /// Makes every `pct` call on all nodes cost as much as a real one, or nothing.
    pub(crate) fn set_cost(&self, on: bool) -> Result<()> {
        for node in self.lab.nodes()? {
            standin::cost::switch(&node.root()?.join("run/pct-standin"), on)?;
        }
        Ok(())
    }

    /// Connects to an agent as the controller does.
    pub(crate) fn agent(&self, node: &str) -> Result<AgentServiceClient<Channel>> {
        let ca = self.lab.layout().dir().join("controller/ca");
        let file = |name: &str| ca.join(name);
        let identity =
            Identity::load(&file("controller.crt"), &file("controller.key"), &file("ca.crt"))?;
        let ip = self.lab.node(node)?.id().ip();
        let name = format!("{node}.agent.pve-sandbox.internal");
        let tls = daemon::tls::client(&identity)?;
        let channel = daemon::channel::tls(Leg::Agent, &format!("{ip}:7445"), &name, tls)?;
        Ok(AgentServiceClient::new(channel))
    }

    /// Returns the resident memory of a node's agent.
    pub(crate) fn agent_rss_mib(&self, node: &str) -> Result<f64> {
        self.agent_memory_mib(node, "VmRSS")
    }

    /// Returns the most memory that a node's agent has had since it started.
    pub(crate) fn agent_peak_mib(&self, node: &str) -> Result<f64> {
        self.agent_memory_mib(node, "VmHWM")
    }

    fn agent_memory_mib(&self, node: &str, line: &str) -> Result<f64> {
        let output = self.lab.node(node)?.shell(&format!(
            "for p in /proc/[0-9]*; do grep -zqx run $p/cmdline 2>/dev/null \
             && [ \"$(readlink $p/exe)\" = /usr/bin/pve-sandbox-agent ] \
             && grep {line} $p/status && break; done",
        ))?;
        memory_mib(&String::from_utf8(output.stdout)?, line)
    }

    /// Returns the most memory that the lab's controller has had since it started.
    pub(crate) fn controller_peak_mib(&self) -> Result<f64> {
        let dir = self.lab.layout().dir().canonicalize()?;
        for process in std::fs::read_dir("/proc")?.flatten() {
            let ours = std::fs::read_link(process.path().join("exe")).is_ok_and(|exe| {
                exe.starts_with(&dir) && exe.ends_with("bin/pve-sandbox-controller")
            });
            if ours {
                let status = std::fs::read_to_string(process.path().join("status"))?;
                return memory_mib(&status, "VmHWM");
            }
        }
        bail!("the lab's controller does not run")
    }

    /// Returns the mean memory that the access to a sandbox takes on the host, and the number of
    /// shims: the PSS of shim, `lxc-attach` and helper.
    pub(crate) fn shim_pss_mib(&self, node: &str) -> Result<(f64, f64)> {
        let output = self.lab.node(node)?.shell(
            "n=0; k=0; for p in /proc/[0-9]*; do case $(tr '\\0' ' ' <$p/cmdline 2>/dev/null) in \
             *pve-sandbox-agent\\ shim*|/proc/self/exe\\ shim*) n=$((n+1));; \
             *lxc-attach*/proc/self/fd/4*|/proc/self/fd/4*) ;; *) continue;; esac; \
             m=$(awk '/^Pss:/ {print $2}' $p/smaps_rollup); k=$((k+${m:-0})); done; echo $n $k",
        )?;
        let text = String::from_utf8(output.stdout)?;
        let mut numbers = text.split_whitespace().filter_map(|word| word.parse::<f64>().ok());
        let (Some(shims), Some(kib)) = (numbers.next(), numbers.next()) else {
            bail!("no memory of shims in {text:?}");
        };
        ensure!(shims > 0.0, "no shim runs on {node}");
        Ok((kib / 1024.0 / shims, shims))
    }
}

/// Returns the address of the controller's API in the lab's network.
pub(crate) fn api_address() -> String {
    format!("{HUB_IP}:7443")
}

/// Returns the address at which a node's Caddy answers.
pub(crate) fn ingress_address(lab: &Lab, node: &str) -> Result<String> {
    Ok(format!("{}:8480", lab.node(node)?.id().ip()))
}

fn connect(lab: &Lab) -> Result<SandboxServiceClient<Channel>> {
    let ca = lab.layout().dir().join("controller/ca/ca.crt");
    let tls = daemon::tls::client_with_roots(&ca)?;
    let channel = daemon::channel::tls(Leg::Api, &api_address(), HUB_IP, tls)?;
    Ok(SandboxServiceClient::new(channel))
}

/// Reads a line of /proc/PID/status.
fn memory_mib(status: &str, name: &str) -> Result<f64> {
    let line = status.lines().find(|line| line.starts_with(name));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)).context("memory of a daemon")?;
    Ok(kib.parse::<f64>()? / 1024.0)
}

/// Returns what a caller sends to run `true`.
fn true_messages(id: &str) -> [exec_request::Message; 2] {
    let start = ExecStart {
        id: id.into(),
        command: Some(exec_start::Command::Argv(Argv { args: vec!["true".into()] })),
        ..ExecStart::default()
    };
    [exec_request::Message::Start(start), exec_request::Message::StdinEof(true)]
}

/// Runs `true` in a sandbox through its agent, and returns its exit code.
pub(crate) async fn exec_true(agent: &mut AgentServiceClient<Channel>, id: &str) -> Result<u32> {
    let sent = tokio_stream::iter(true_messages(id).map(|message| agent::ExecRequest {
        message: Some(ExecRequest { message: Some(message) }),
        ..Default::default()
    }));
    let mut answers = agent.exec(sent).await?.into_inner();
    while let Some(answer) = answers.message().await? {
        if let Some(exec_response::Message::Exit(exit)) = answer.message.and_then(|m| m.message) {
            return Ok(exit.code);
        }
    }
    bail!("the stream ended without an exit")
}

/// Returns the duration in milliseconds, and the result.
pub(crate) async fn timed<T>(work: impl Future<Output = T>) -> (f64, T) {
    let begun = Instant::now();
    let done = work.await;
    (begun.elapsed().as_secs_f64() * 1000.0, done)
}
