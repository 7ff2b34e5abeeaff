//! `ca rotate`: a new CA in the place of the old one, which is kept beside it. The controller's certificate
//! keeps its names. What has a certificate of the old CA is refused from then on, so all nodes join again.
//! The controller runs on with the old one until it is restarted with the new one.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::Args;
use daemon::systemctl;
use data_encoding::HEXLOWER;

use super::{Host, UNIT, give_to_owner, join_loop, joined, machine, start};
use crate::{
    audit::{self, LocalCommand, LocalEntry},
    ca::{self, Lives, Rotation, Signer},
    clock::SystemClock,
    config::Config,
    store::enrolments::Enrolment,
};

/// Arguments of `ca rotate`.
#[derive(Debug, Args)]
pub struct Rotate {
    /// Configuration file.
    #[arg(long, default_value = "/etc/pve-sandbox/controller.toml")]
    config: PathBuf,
    /// Show what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

impl Rotate {
    /// Replaces the CA, says through `say` what joins again, and restarts the controller if it runs.
    ///
    /// # Errors
    /// When a step fails. The old CA is in its place then, unless the error says that the CA is replaced, or is
    /// one of `say`.
    pub async fn run(&self, say: &mut (dyn FnMut(&str) -> Result<()> + Send)) -> Result<()> {
        let config = Config::load(&self.config)?;
        let data = &config.data_dir;
        if !self.dry_run {
            ca::recover(data)?;
        }
        let names = ca::names(data)?;
        let enrolled = joined(&config).await?;
        if self.dry_run {
            let old = ca::old_name(data)?;
            say(&format!("would keep the CA as {}, and make a new one", old.display()))?;
            say(&format!("would make a certificate for {}", names.join(", ")))?;
            say(client_certificates(ca::keeps_client_ca(data)?))?;
            return say(&format!("{} nodes would have to join again", enrolled.len()));
        }
        let runs = systemctl::is_there() && systemctl::run(&["is-active", "--quiet", UNIT]).is_ok();
        let keeps_client_ca = ca::keeps_client_ca(data)?;
        let (old, recorded) = {
            let rotation = Rotation::new(data, &names, give_to_owner)?;
            let command = LocalCommand { method: "LocalCaRotate", object: "ca", owner: "" };
            let entry = LocalEntry::begin(&audit::dir(data), &SystemClock, command).await?;
            let done = rotation.run();
            let recorded = entry.end(&SystemClock, done.is_ok()).await;
            done?;
            (rotation.old().to_owned(), recorded)
        };
        let lines = report(data, &old, &names, (&enrolled, keeps_client_ca));
        finish(lines, say, || if runs { start(&["restart", UNIT]) } else { Ok(()) })?;
        recorded.context("the CA is replaced, but the audit log has no end of that")
    }
}

fn client_certificates(stay_good: bool) -> &'static str {
    match stay_good {
        true => "client certificates stay good",
        false => "client certificates are void: their CA has ended, is broken, or was never there",
    }
}

/// Builds the lines about the CA that is in its place now.
fn report(
    data: &Path,
    old: &Path,
    names: &[String],
    (enrolled, keeps_client_ca): (&[Enrolment], bool),
) -> Result<Vec<String>> {
    let fingerprint = HEXLOWER.encode(&Signer::load(data, Lives::default())?.fingerprint());
    let new = ca::Files::new(data).ca();
    let mut lines = vec![
        format!("the old CA is {}; it has a key: remove it when nothing needs it", old.display()),
        format!("the new CA is {}, its SHA-256 {fingerprint}", new.display()),
        format!("the controller's certificate is for {}", names.join(", ")),
        "callers on other machines need the new CA's file (sandboxctl login NAME --ca FILE)".into(),
        client_certificates(keeps_client_ca).into(),
    ];
    let own = machine::pve_node(Path::new(machine::MEMBERS));
    let own = own.filter(|own| enrolled.iter().any(|known| known.node == *own));
    let others = enrolled.iter().filter(|known| Some(&known.node) != own.as_ref());
    let others: Vec<_> = others
        .map(|known| Host { node: known.node.clone(), address: address(&known.address) })
        .collect();
    let joins = join_loop(own.as_ref(), &others);
    if !joins.is_empty() {
        lines.push("every node joins again, by these lines where root's ssh reaches it:".into());
    }
    lines.extend(joins);
    Ok(lines)
}

/// Says the lines, and restarts the controller whatever becomes of them: their reader may have gone.
fn finish(
    lines: Result<Vec<String>>,
    say: &mut (dyn FnMut(&str) -> Result<()> + Send),
    restart: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let said = lines.and_then(|lines| lines.iter().try_for_each(|line| say(line)));
    restart().with_context(|| {
        format!("the CA is replaced; restart by hand: systemctl restart {UNIT}")
    })?;
    said.context("the CA is replaced, but not all about it was said")
}

/// Returns the address of an agent without its port; `None` for a host name.
fn address(agent: &str) -> Option<IpAddr> {
    agent.parse::<SocketAddr>().ok().map(|address| address.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_of_an_agent_is_used_without_its_port() {
        assert_eq!(address("192.0.2.12:7445"), "192.0.2.12".parse().ok());
        assert_eq!(address("[2001:db8::2]:7445"), "2001:db8::2".parse().ok());
        assert_eq!(address("pve2.example.org:7445"), None);
    }

    #[test]
    fn controller_is_restarted_though_nobody_reads_what_is_said() {
        let lines = || Ok(vec!["the new CA".to_owned()]);
        let mut deaf = |_: &str| -> Result<()> { anyhow::bail!("cannot write to stdout") };
        let mut restarted = false;
        let restart = || {
            restarted = true;
            Ok(())
        };
        finish(lines(), &mut deaf, restart).expect_err("not said");
        assert!(restarted);
        let error = finish(lines(), &mut deaf, || anyhow::bail!("no bus")).expect_err("both");
        let told = format!("{error:#}");
        assert!(told.contains("systemctl restart") && told.contains("no bus"), "{told}");
    }
}
