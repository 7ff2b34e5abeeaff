//! Applies the rules to this host: by `nft`, and by one setting of each bridge.
//!
//! A bridge learns behind which port a MAC is from every frame that it takes. Frames to the reserved
//! address of LLDP pass no hook of nftables, so one with a neighbour's MAC would draw the neighbour's
//! traffic: `no_linklocal_learn` tells the bridge to learn nothing from them.

use std::{
    collections::BTreeSet, ffi::OsString, fs, io, net::Ipv4Addr, path::PathBuf, time::Duration,
};

use nix::sys::signal::Signal;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    sync::Mutex,
    time::{Instant, timeout},
};

use super::{
    Error, Firewall, Grant, Grounds, Result, Rules,
    listing::{self, Listing},
    names::{self, Book, Kernel},
    ports, render,
};
use crate::{
    run::{self, Exit, Running},
    sys::read,
};

/// Program of the Debian package `nftables`.
const NFT: &str = "/usr/sbin/nft";
/// Kernel's list of network interfaces.
const NET: &str = "/sys/class/net";
/// Longest run of `nft`: it takes milliseconds.
const DEADLINE: Duration = Duration::from_secs(10);
/// Longest listing of our tables: some hundred bytes a sandbox.
const LISTING_MAX: u64 = 16 * 1024 * 1024;
/// Longest error text that is kept.
const ERROR_MAX: u64 = 2 * 1024;
/// Most of an error text that is shown.
const SHOWN_MAX: usize = 300;

/// Rules of this host's network namespace.
#[derive(Debug)]
pub struct NftFirewall {
    net: PathBuf,
    /// Command line of nft, without arguments.
    nft: Vec<OsString>,
    /// Rules that were applied last; the lock also makes changes take turns.
    applied: Mutex<Option<Applied>>,
    /// Addresses of sandboxes with lists. Locked after `applied`, and never while listing for a
    /// comparison: questions for names do not wait for that.
    names: Mutex<Names>,
    /// Whether this kernel can count connections; `None`: not tried yet.
    counts: daemon::sync::Mutex<Option<bool>>,
}

#[derive(Debug, Default)]
struct Names {
    book: Book,
    /// Whether it has what an earlier agent left in the kernel.
    recalled: bool,
}

#[derive(Debug)]
struct Applied {
    rules: Rules,
    /// Our tables as `nft` listed them right after that.
    listing: Listing,
}

impl Default for NftFirewall {
    fn default() -> Self {
        Self {
            net: NET.into(),
            nft: vec![NFT.into()],
            applied: Mutex::default(),
            names: Mutex::default(),
            counts: Default::default(),
        }
    }
}

#[async_trait::async_trait]
impl Firewall for NftFirewall {
    fn can_filter(&self, bridge: &str) -> Result<()> {
        if self.net.join(bridge).join("bridge").is_dir() {
            return Ok(());
        }
        Err(Error::NotABridge(bridge.to_owned()))
    }

    async fn apply(&self, rules: &Rules) -> Result<()> {
        let mut applied = self.applied.lock().await;
        let grounds = self.possible(&rules.grounds).await?;
        let rules = &Rules { grounds, ..rules.clone() };
        for bridge in self.bridges(rules) {
            self.learn_nothing_reserved(&bridge)?;
        }
        // Taken out: if this future is dropped half-way, the next call replaces everything.
        let before = applied.take();
        if before.as_ref().is_some_and(|before| before.rules == *rules) {
            *applied = before;
            return Ok(());
        }
        self.replace(before.as_ref().map(|before| &before.rules), rules).await?;
        let listing = self.list(rules).await?;
        *applied = Some(Applied { rules: rules.clone(), listing });
        Ok(())
    }

    async fn can_allow(&self, grounds: &Grounds) -> Result<()> {
        // Where that cannot be told, the next check says why.
        let grounds = self.possible(grounds).await.unwrap_or_else(|_| grounds.clone());
        let ended = self.nft(&["-c", "-f", "-"], &names::probe(&grounds)).await?;
        // Busy, or short of memory: it may be otherwise the next time.
        if ended.exit == Exit::Code(0) || !ended.lacks() { Ok(()) } else { Err(ended.refusal()) }
    }

    async fn allow(&self, grants: &[Grant]) -> Result<BTreeSet<(Ipv4Addr, String)>> {
        let mut names = self.names.lock().await;
        let change = names.book.grant(grants, Instant::now());
        self.transact(&names::granting(&change)).await?;
        names.book.remove(&change.remove);
        Ok(change.refused)
    }

    async fn check(&self) -> Result<Option<String>> {
        let mut applied = self.applied.lock().await;
        let Some(expected) = &*applied else { return Ok(None) };
        let found = self.list(&expected.rules).await?;
        let mut differences = listing::differences(&expected.listing, &found);
        if found.is_empty() {
            differences = vec!["the tables are missing".to_owned()];
        }
        for bridge in self.bridges(&expected.rules) {
            let setting = self.setting(&bridge);
            if read::text(&setting, read::SMALL).trim() == "0" {
                differences.push(setting.display().to_string());
            }
        }
        if differences.is_empty() {
            return Ok(None);
        }
        *applied = None;
        Ok(Some(differences.join(", ")))
    }

    fn counts_connections(&self) -> bool {
        // Tried only where there is a limit.
        *self.counts.lock() != Some(false)
    }
}

impl NftFirewall {
    /// Creates the firewall of a host with these interfaces and this command line of nft.
    #[cfg(test)]
    pub(super) fn of(net: &std::path::Path, nft: &[String]) -> Self {
        let nft = nft.iter().map(OsString::from).collect();
        Self { net: net.to_owned(), nft, ..Self::default() }
    }

    /// Removes our tables from the host, those of an earlier or later version too; returns them. For a host
    /// without isolation: what is left there would go on to filter, by names of interfaces that return.
    ///
    /// # Errors
    /// When a table stays.
    pub async fn remove(&self) -> Result<Vec<String>> {
        let mut applied = self.applied.lock().await;
        *applied = None;
        let listed = match self.nft(&["list", "tables"], "").await {
            Ok(listed) => listed,
            // Without the program there are no tables of ours.
            Err(Error::Run(_)) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        if listed.exit != Exit::Code(0) {
            return Err(listed.refusal());
        }
        let ours = our_tables(&listed.stdout);
        let lines = ours.iter().map(|table| format!("delete {table}\n"));
        self.transact(&lines.collect::<String>()).await?;
        Ok(ours)
    }

    /// Puts rules in force, by a change of those that are or as a whole.
    async fn replace(&self, before: Option<&Rules>, rules: &Rules) -> Result<()> {
        let mut names = self.names.lock().await;
        names.book.follow(rules);
        let transaction = before.and_then(|before| {
            let change = render::change(before, rules)?;
            Some(change + &names::change(before, rules, &names.book))
        });
        let changed = match transaction {
            None => false,
            Some(transaction) => match self.transact(&transaction).await {
                Ok(()) => true,
                Err(error) => {
                    tracing::warn!(%error, "isolation rules were not changed; replacing them all");
                    false
                }
            },
        };
        if !changed {
            let kernel = self.kernel().await;
            if !std::mem::replace(&mut names.recalled, true) {
                names.book.recall(&kernel, Instant::now());
            }
            let names = names::whole(rules, &names.book, &kernel, Instant::now());
            self.transact(&(render::whole(rules) + &names)).await?;
        }
        let gone = names.book.gone().clone();
        if !gone.is_empty() && names::are_needed(rules) {
            // A packet that was on its way may have renewed one.
            self.transact(&names::removal(&gone)).await?;
        }
        names.book.remove(&gone);
        Ok(())
    }

    /// Lists the addresses of sandboxes with lists; none where that fails.
    async fn kernel(&self) -> Kernel {
        match (self.list_set(names::LISTED).await, self.list_set(names::ALLOWED).await) {
            (Some(listed), Some(allowed)) => Kernel::parse(&listed, &allowed),
            _ => Kernel::default(),
        }
    }

    async fn list_set(&self, set: &str) -> Option<String> {
        let line = ["-j", "list", "set", "inet", names::TABLE, set];
        let ended = self.nft(&line, "").await.ok()?;
        (ended.exit == Exit::Code(0)).then_some(ended.stdout)
    }

    /// Finds the bridges of the sandboxes: those that the rules name, and those that their ports
    /// hang on, as with a VLAN of a bridge, for which PVE makes another.
    fn bridges(&self, rules: &Rules) -> BTreeSet<String> {
        let ports = rules.sandboxes.keys().flat_map(|vmid| ports(*vmid));
        let masters = ports.filter_map(|port| {
            let master = fs::read_link(self.net.join(port).join("master")).ok()?;
            Some(master.file_name()?.to_string_lossy().into_owned())
        });
        let all = masters.chain(rules.bridges.iter().cloned());
        all.filter(|bridge| self.can_filter(bridge).is_ok()).collect()
    }

    /// Returns the grounds without what this kernel cannot do.
    async fn possible(&self, grounds: &Grounds) -> Result<Grounds> {
        let counts = grounds.connections.is_some() || grounds.name_connections.is_some();
        if !counts || self.can_count().await? {
            return Ok(grounds.clone());
        }
        Ok(Grounds { connections: None, name_connections: None, ..grounds.clone() })
    }

    /// Finds out once whether this kernel can count connections, by a check that changes nothing.
    async fn can_count(&self) -> Result<bool> {
        if let Some(known) = *self.counts.lock() {
            return Ok(known);
        }
        let ended = self.nft(&["-c", "-f", "-"], &render::counting_probe()).await?;
        let can = ended.exit == Exit::Code(0);
        if !can {
            let error = ended.refusal();
            if !ended.lacks() {
                // Busy, or short of memory: it may be otherwise the next time.
                return Err(error);
            }
            tracing::warn!(
                %error,
                "this kernel cannot count connections (nft_connlimit): limits.connections is not in force, and \
                 nothing limits those to name servers"
            );
        }
        *self.counts.lock() = Some(can);
        Ok(can)
    }

    fn setting(&self, bridge: &str) -> PathBuf {
        self.net.join(bridge).join("bridge/no_linklocal_learn")
    }

    fn learn_nothing_reserved(&self, bridge: &str) -> Result<()> {
        let setting = self.setting(bridge);
        if read::text(&setting, read::SMALL).trim() == "1" {
            return Ok(());
        }
        fs::write(&setting, "1").map_err(|error| Error::Bridge {
            path: setting.display().to_string(),
            why: error.to_string(),
        })
    }

    async fn transact(&self, text: &str) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let ended = self.nft(&["-f", "-"], text).await?;
        if ended.exit == Exit::Code(0) { Ok(()) } else { Err(ended.refusal()) }
    }

    /// Lists our tables; a table that is missing has no parts. The addresses of names are left out: there
    /// can be many of them.
    async fn list(&self, rules: &Rules) -> Result<Listing> {
        let mut listing = Listing::new();
        for family in render::FAMILIES {
            let mut lines = vec![vec!["-j", "list", "table", family, render::TABLE]];
            if names::are_needed(rules) {
                lines.push(vec!["-j", "-t", "list", "table", family, names::TABLE]);
                lines.push(vec!["-j", "list", "set", family, names::TABLE, names::LISTED]);
            }
            for line in lines {
                let ended = self.nft(&line, "").await?;
                if ended.exit == Exit::Code(0) {
                    listing.extend(listing::parse(&ended.stdout));
                } else if !ended.stderr.contains("No such file or directory") {
                    return Err(ended.refusal());
                }
            }
        }
        Ok(listing)
    }

    async fn nft(&self, arguments: &[&str], stdin: &str) -> Result<Ended> {
        let argv: Vec<OsString> =
            self.nft.iter().cloned().chain(arguments.iter().map(OsString::from)).collect();
        let piped = run::spawn_piped(&argv, Vec::new()).map_err(failed)?;
        let run::Piped { stdin: mut input, stdout, stderr, mut process } = piped;
        let work = async {
            let feed = async move {
                // nft may end before it has read everything: its exit and its message tell why.
                drop(input.write_all(stdin.as_bytes()).await);
            };
            let ((), stdout, stderr) =
                tokio::join!(feed, all(stdout, LISTING_MAX), all(stderr, ERROR_MAX));
            let exit = process.wait().await.map_err(failed)?;
            Ok(Ended { exit, stdout: stdout.map_err(failed)?, stderr: stderr.map_err(failed)? })
        };
        if let Ok(ended) = timeout(DEADLINE, work).await {
            return ended;
        }
        stop(&process);
        Err(Error::Deadline)
    }
}

/// Run of nft that has ended.
struct Ended {
    exit: Exit,
    stdout: String,
    stderr: String,
}

impl Ended {
    /// Returns true when it failed for something that this kernel does not have.
    fn lacks(&self) -> bool {
        let lacks = ["No such file or directory", "not supported"];
        lacks.iter().any(|why| self.stderr.contains(why))
    }

    fn refusal(&self) -> Error {
        let line = self.stderr.lines().find(|line| !line.trim().is_empty()).unwrap_or("no message");
        Error::Refused(line.chars().take(SHOWN_MAX).collect())
    }
}

/// Finds our tables in what `nft list tables` prints, each as `table inet pve_sandbox`. They have families of
/// their own: `ip pve_sandbox_nat` is the sandboxes' way out, and goes with their bridge only.
fn our_tables(listed: &str) -> Vec<String> {
    let is_ours = |line: &&str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let ["table", family, name] = words.as_slice() else { return false };
        let rest = name.strip_prefix(render::TABLE);
        render::FAMILIES.contains(family)
            && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
    };
    listed.lines().map(str::trim).filter(is_ours).map(str::to_owned).collect()
}

fn stop(process: &Running) {
    if let Err(error) = process.signal(Signal::SIGKILL) {
        tracing::warn!(%error, "nft was not stopped");
    }
}

fn failed(error: io::Error) -> Error {
    Error::Run(error.to_string())
}

async fn all(pipe: impl AsyncRead + Unpin, max: u64) -> io::Result<String> {
    let mut bytes = Vec::new();
    pipe.take(max).read_to_end(&mut bytes).await?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
