//! Node of PVE that this machine is: `setup --join` joins its agent, and makes what that node lacks. The
//! agent's own `setup` knows what this is, so it is asked and told.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use daemon::{doctor::reach, systemctl};
use data_encoding::HEXLOWER;

use super::{Report, Setup, UNIT, join_loop, joined, machine};
use crate::{
    ca,
    clock::{Clock as _, SystemClock},
    config::Config,
    enrolment,
    store::{enrolments::Enrolments as _, sqlite::Sqlite},
};

/// Program of a node's agent.
const AGENT: &str = "/usr/sbin/pve-sandbox-agent";
/// Certificate of a node that has joined, where the packaged configuration has it.
const CERTIFICATE: &str = "/etc/pve-sandbox/tls/node.crt";
/// Variable by which the agent's `join` takes a token that must not stand in its arguments.
const JOIN_TOKEN: &str = "PVE_SANDBOX_JOIN_TOKEN";
/// Longest look of the agent at its node.
const LOOK: Duration = Duration::from_secs(60);
/// Begin of each line in which the agent's `setup --dry-run` names what is missing.
const WOULD: &str = "would ";

/// Returns the address by which the agent of this machine reaches the controller: where that listens, or the best name
/// of this machine where it listens everywhere.
pub(super) fn reachable(listen: SocketAddr, names: &[String]) -> String {
    let port = listen.port();
    let mut served = names.iter().filter(|name| machine::serves(listen.ip(), name));
    match served.next().filter(|_| listen.ip().is_unspecified()) {
        Some(name) if name.contains(':') => format!("[{name}]:{port}"),
        Some(name) => format!("{name}:{port}"),
        None => reach::local(listen).to_string(),
    }
}

impl Setup {
    /// Joins the agent of this machine and makes what its node lacks, or says how.
    pub(super) async fn node(&self, config: &Config, report: &mut Report<'_>) -> Result<()> {
        let members = self.of_node(machine::MEMBERS);
        let Some(node) = machine::pve_node(&members) else { return Ok(()) };
        let path = config.database();
        // The node has its certificate: else a join was interrupted, and is repeated.
        let has_joined = joined(config).await?.iter().any(|known| known.node == node);
        if has_joined && self.of_node(CERTIFICATE).exists() {
            return if self.join { self.complete(report).await } else { Ok(()) };
        }
        if !self.join {
            return report.note(&format!(
                "this machine is the node {node} of PVE, which has not joined: `{UNIT} setup --join` \
                 joins it, or the line that `sandboxctl node token {node}` prints"
            ));
        }
        let what = format!("join the agent of {node}");
        if report.dry_run {
            return report.step(&what, || Ok(()));
        }
        let agent = self.agent()?;
        let (text, row) = enrolment::issue(&node, 0, SystemClock.now_ms())?;
        Sqlite::open(&path)?.add_node_token(row).await?;
        let signer = ca::Signer::load(&config.data_dir, ca::Lives::default())?;
        let pin = HEXLOWER.encode(&signer.fingerprint());
        let controller = format!("https://{}", reachable(config.listen, &machine::names()));
        let words = self.words(&["join", &controller, "--ca-sha256", &pin]);
        report.step(&what, || Ok(systemctl::run_program(&agent, &words, &[(JOIN_TOKEN, &text)])?))
    }

    /// Makes what a node lacks that has joined: an earlier run may have ended before it had all.
    async fn complete(&self, report: &mut Report<'_>) -> Result<()> {
        let agent = self.agent()?;
        let words = self.words(&["setup"]);
        let look = [&words[..], &["--dry-run"]].concat();
        let told = systemctl::ask(&agent, &look, LOOK).await;
        let told = told.with_context(|| format!("`{AGENT} setup --dry-run` did not answer"))?;
        anyhow::ensure!(
            told.success,
            "`{AGENT} setup --dry-run` failed; run it to see why (agents of earlier versions do not have it)"
        );
        let lacks: Vec<_> =
            told.stdout.lines().filter_map(|line| line.strip_prefix(WOULD)).collect();
        if lacks.is_empty() {
            return Ok(());
        }
        report.step(&lacks.join(", "), || Ok(systemctl::run_program(&agent, &words, &[])?))
    }

    /// Says how the other nodes of this machine's cluster join that have not.
    pub(super) async fn other_nodes(&self, config: &Config, report: &mut Report<'_>) -> Result<()> {
        let mut others = machine::other_nodes(&self.of_node(machine::MEMBERS));
        let known = joined(config).await?;
        others.retain(|host| known.iter().all(|joined| joined.node != host.node));
        if others.is_empty() {
            return Ok(());
        }
        report.note(
            "other nodes of this cluster have not joined. Where the package pve-sandbox-agent is installed on \
             them, these lines join them, by the ssh that root has among the nodes:",
        )?;
        join_loop(None, &others).iter().try_for_each(|line| report.note(line))
    }

    /// Returns a path of the node, below the root that it is looked for in.
    pub(super) fn of_node(&self, path: &str) -> PathBuf {
        self.node_root.join(path.trim_start_matches('/'))
    }

    pub(super) fn agent(&self) -> Result<PathBuf> {
        let agent = self.of_node(AGENT);
        anyhow::ensure!(agent.exists(), "the package pve-sandbox-agent is not installed");
        Ok(agent)
    }

    /// Completes a command line of the agent.
    fn words<'a>(&self, words: &[&'a str]) -> Vec<&'a str> {
        let start: &[&str] = if self.no_start { &["--no-start"] } else { &[] };
        [words, start].concat()
    }
}
