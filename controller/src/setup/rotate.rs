//! `ca rotate`: a new CA in the place of the old one, which is kept beside it. The controller's certificate
//! keeps its names. What has a certificate of the old CA is refused from then on, so all nodes join again.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::Args;
use daemon::systemctl;

use super::{Host, UNIT, give_to_owner, join_loop, joined, machine, start};
use crate::{
    ca::{self, Lives, Signer},
    config::Config,
    token,
};

/// Most old CAs that are kept beside the new one.
const OLD_MAX: u32 = 100;

/// Arguments of `ca rotate`.
#[derive(Debug, Args)]
pub struct Rotate {
    /// The configuration.
    #[arg(long, default_value = "/etc/pve-sandbox/controller.toml")]
    config: PathBuf,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
}

impl Rotate {
    /// Replaces the CA, restarts the controller if it runs, and says through `say` what joins again.
    ///
    /// # Errors
    /// When a step fails; then the old CA is back in its place.
    pub async fn run(&self, say: &mut (dyn FnMut(&str) -> Result<()> + Send)) -> Result<()> {
        let config = Config::load(&self.config)?;
        let data = &config.data_dir;
        let names = ca::names(data)?;
        let enrolled = joined(&config).await?;
        let (dir, old) = (data.join("ca"), free_name(data)?);
        if self.dry_run {
            say(&format!("would keep the CA as {}, and make a new one", old.display()))?;
            say(&format!("would make a certificate for {}", names.join(", ")))?;
            return say(&format!("{} nodes would have to join again", enrolled.len()));
        }
        let runs = systemctl::is_there() && systemctl::run(&["is-active", "--quiet", UNIT]).is_ok();
        if runs {
            systemctl::run(&["stop", UNIT])?;
        }
        let replaced = replace(data, &dir, &old, &names);
        // Also with the old CA, where there is no new one.
        if runs {
            start(&["start", UNIT])?;
        }
        replaced?;
        say(&format!(
            "the old CA is {}; it has a key: remove it when nothing needs it",
            old.display()
        ))?;
        let fingerprint = Signer::load(data, Lives::default())?.fingerprint();
        let new = ca::Files::new(data).ca();
        say(&format!("the new CA is {}, its SHA-256 {}", new.display(), token::hex(&fingerprint)))?;
        say(&format!("the controller's certificate is for {}", names.join(", ")))?;
        say("callers on other machines need the new CA's file (sandboxctl login NAME --ca FILE)")?;
        say("client certificates stay good")?;

        let own = machine::pve_node().filter(|own| enrolled.iter().any(|known| known.node == *own));
        let others = enrolled.iter().filter(|known| Some(&known.node) != own.as_ref());
        let others: Vec<_> = others
            .map(|known| Host { node: known.node.clone(), address: address(&known.address) })
            .collect();
        let lines = join_loop(own.as_ref(), &others);
        if !lines.is_empty() {
            say("every node joins again, by these lines where root's ssh reaches it:")?;
        }
        lines.iter().try_for_each(|line| say(line))
    }
}

/// Moves the old CA away and makes a new one; on a failure the old one is put back.
fn replace(data: &Path, dir: &Path, old: &Path, names: &[String]) -> Result<()> {
    fs::rename(dir, old).with_context(|| format!("cannot rename {}", dir.display()))?;
    let made = keep_client_ca(old, dir)
        .context("cannot keep the CA of client certificates")
        .and_then(|()| ca::init(data, names).map_err(anyhow::Error::from))
        .and_then(|_| give_to_owner(data).context("cannot give the new CA to the controller"));
    made.or_else(|error| {
        drop(fs::remove_dir_all(dir));
        fs::rename(old, dir).with_context(|| format!("cannot put {} back", old.display()))?;
        Err(error.context("the old CA is in its place again"))
    })
}

/// Copies the CA of client certificates, which signs nothing else: tokens that callers have stay good.
fn keep_client_ca(old: &Path, new: &Path) -> std::io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(new)?;
    for file in ca::CLIENT_CA_FILES {
        match fs::copy(old.join(file), new.join(file)) {
            // An earlier version had none.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            copied => drop(copied?),
        }
    }
    Ok(())
}

/// Returns a name for the old CA that nothing has.
fn free_name(data: &Path) -> Result<PathBuf> {
    let mut names = (1..=OLD_MAX).map(|number| data.join(format!("ca.old-{number}")));
    let free = names.find(|path| fs::symlink_metadata(path).is_err());
    free.with_context(|| format!("there are {OLD_MAX} old CAs in {}: remove some", data.display()))
}

/// Returns the address of an agent without its port; `None` for a host name.
fn address(agent: &str) -> Option<IpAddr> {
    agent.parse::<SocketAddr>().ok().map(|address| address.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(data: &Path) -> String {
        fs::read_to_string(data.join("ca/ca.crt")).expect("a CA")
    }

    #[test]
    fn new_ca_keeps_the_names_and_the_old_one_is_beside_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let data = dir.path();
        ca::init(data, &["api.example.com".to_owned(), "192.0.2.11".to_owned()]).expect("made");
        let (first, names) = (certificate(data), ca::names(data).expect("names"));
        for round in 1..=2 {
            let before = certificate(data);
            let old = free_name(data).expect("a name");
            replace(data, &data.join("ca"), &old, &names).expect("replaced");
            assert!(old.ends_with(format!("ca.old-{round}")), "{old:?}");
            assert_eq!(fs::read_to_string(old.join("ca.crt")).expect("kept"), before);
            assert_ne!(certificate(data), before);
            for file in ca::CLIENT_CA_FILES {
                let read = |dir: &Path| fs::read(dir.join(file)).expect("the CA of callers");
                assert_eq!(read(&data.join("ca")), read(&old), "{file}");
            }
            assert_eq!(ca::names(data).expect("names"), names);
        }
        assert_ne!(certificate(data), first);
    }

    #[test]
    fn old_ca_is_back_where_no_new_one_can_be_made() {
        let dir = tempfile::tempdir().expect("a directory");
        let data = dir.path();
        ca::init(data, &[]).expect("made");
        let before = certificate(data);
        let old = free_name(data).expect("a name");
        let error = replace(data, &data.join("ca"), &old, &["no name".to_owned()]);
        assert!(error.is_err() && !old.exists(), "{error:?}");
        assert_eq!(certificate(data), before);
    }

    #[test]
    fn address_of_an_agent_is_used_without_its_port() {
        assert_eq!(address("192.0.2.12:7445"), "192.0.2.12".parse().ok());
        assert_eq!(address("[2001:db8::2]:7445"), "2001:db8::2".parse().ok());
        assert_eq!(address("pve2.example.org:7445"), None);
    }
}
