//! Joins a controller: one command on a bare node. The node makes its keys, shows a one-time token, and
//! installs the certificates and the settings that it gets.
//!
//! ```text
//!  keys (NAME.key.next, durable) -> Join -> CAs -> agent.toml -> CERT.for -> certificates, the agent's last
//! ```
//! Every step can be repeated: a run after a crash has the same key, so the same token is good for it
//! until it expires; a run with a new token replaces all. Once the agent's certificate is there that `CERT.for`
//! names, a run of the same line has nothing left to ask for.

pub mod lacks;
pub mod other_caddy;
mod settings;

use std::{
    fs::DirBuilder,
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use daemon::{
    key_files::KeyFiles,
    replace::{Access, replace},
    text,
};
use data_encoding::HEXLOWER_PERMISSIVE;
use proto::{name::NodeName, sandbox::v1::JoinRequest, secret::Secret};
use tokio::time::{Duration, Instant, sleep};

use crate::{
    bridge,
    certificates::{self, access_of, request},
    config::{File, Pool, pool_of_host},
    detect::{self, Roots},
    rpc::join as call,
};

/// Default port of the agent.
const PORT: u16 = 7445;
/// Default listen address of the agent.
const ALL_IPV4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), PORT);
/// Listen address for a node that is reached by IPv6. Linux has it serve IPv4, too.
const ALL: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), PORT);
/// Longest wait for a renewal of the certificates, which takes milliseconds, and the pause between two tries.
const LOCK: Duration = Duration::from_secs(10);
const LOCK_AGAIN: Duration = Duration::from_millis(100);
/// Default port of a controller's API.
const API_PORT: u16 = 7443;

/// The line that joins a node, as an operator gives it.
#[derive(Debug, Clone, clap::Args)]
pub struct Line {
    /// Address of the controller: https://host:port
    pub controller: String,
    /// One-time token of this node, from `sandboxctl node token NODE`. Everybody on the node can read a
    /// command line: give it in the variable instead
    #[arg(long, env = "PVE_SANDBOX_JOIN_TOKEN", hide_env_values = true)]
    pub token: Secret<String>,
    /// SHA-256 of the CA certificate of the controller, hex
    #[arg(long, value_name = "HEX")]
    pub ca_sha256: String,
    /// Address on which the controller reaches this node's agent [default: the one that leads to the
    /// controller]
    #[arg(long)]
    pub address: Option<IpAddr>,
    /// Addresses of this node's sandboxes: a network, or first-last [default: what the configuration or
    /// the bridge says, else what the controller gives]
    #[arg(long)]
    pub pool: Option<Pool>,
    /// Make no bridge for the sandboxes: they use the one that is there
    #[arg(long)]
    pub no_bridge: bool,
    /// PVE's name of this node [default: what pmxcfs says]
    #[arg(long)]
    pub node: Option<NodeName>,
}

/// Reason why a node could not join.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A word of the line is wrong.
    #[error("{0}")]
    Line(String),
    /// The configuration cannot be read.
    #[error("the configuration was not read")]
    Config(#[from] daemon::config::Error),
    /// The sandboxes' bridge cannot be made. Nothing was done yet.
    #[error(
        "this node has not joined, and its token is still good: the sandboxes' bridge cannot be made"
    )]
    Bridge(#[from] bridge::Error),
    /// The agent would not listen where the controller reaches the node. Nothing was done yet.
    #[error(
        "this node has not joined, and its token is still good: the controller is to reach its agent at {ip}, where listen = \
         \"{listen}\" in agent.toml serves nothing: set listen = \"[::]:{}\", which serves IPv6 and IPv4, or name another \
         address of this node with --address",
        .listen.port()
    )]
    Listen {
        /// Setting of the operator.
        listen: SocketAddr,
        /// Address of the node.
        ip: IpAddr,
    },
    /// The node's name is not known.
    #[error("the name of this node is not known: give it with --node")]
    Name(#[source] detect::Undecided),
    /// The controller did not admit the node.
    #[error(transparent)]
    Call(#[from] call::Error),
    /// A file cannot be read or written.
    #[error("cannot use {}", .0.display())]
    File(PathBuf, #[source] io::Error),
}

/// Done step, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done(pub Vec<String>);

/// Fingerprint of a CA in hex, with or without colons.
fn fingerprint(text: &str) -> Result<[u8; 32], Error> {
    let invalid = || Error::Line("--ca-sha256 must be 64 hexadecimal digits".to_owned());
    let digits = text.replace(':', "");
    let bytes = HEXLOWER_PERMISSIVE.decode(digits.as_bytes()).map_err(|_| invalid())?;
    bytes.try_into().map_err(|_| invalid())
}

/// Returns `host:port` of a controller's address.
fn host_and_port(text: &str) -> Result<String, Error> {
    let invalid = || Error::Line(format!("{text:?} is no address: https://host:port"));
    let rest = text.strip_prefix("https://").unwrap_or(text).trim_end_matches('/');
    if rest.is_empty() || rest.contains(['/', '@', ' ']) {
        return Err(invalid());
    }
    let has_port = rest.rsplit_once(':').is_some_and(|(host, port)| {
        port.parse::<u16>().is_ok() && (!host.contains(':') || host.ends_with(']'))
    });
    Ok(if has_port { rest.to_owned() } else { format!("{rest}:{API_PORT}") })
}

/// Joins the controller, and writes what the agent needs. The agent's configuration may be missing; `net` is
/// the kernel's list of interfaces.
///
/// # Errors
/// When the controller refuses, or a file cannot be written. The line can be run again.
pub async fn run(line: &Line, paths: &bridge::Paths, net: &Path) -> Result<Done, Error> {
    let path = paths.config.as_path();
    let ca_sha256 = fingerprint(&line.ca_sha256)?;
    let controller = host_and_port(&line.controller)?;
    let config: File = if path.exists() { daemon::config::load(path)? } else { File::default() };
    let pve = config.pve.clone();
    let roots = Roots { pve: &pve.root, proc: &pve.proc, net };
    let identity = detect::identity(roots);
    let number = identity.as_ref().ok().and_then(|identity| identity.number).unwrap_or(0);
    let name = match line.node.clone().or_else(|| config.node.clone()) {
        Some(name) => name,
        None => identity.map(|identity| identity.node).map_err(Error::Name)?,
    };
    let listen = config.listen.unwrap_or(ALL_IPV4);
    let ip = match line.address {
        Some(address) => address,
        None if !listen.ip().is_unspecified() => listen.ip(),
        None => call::own_address(&controller).await?,
    };
    let address = SocketAddr::new(ip, listen.port()).to_string();
    let pool = line.pool.map(|pool| pool.to_string());
    // A bridge that is still to be made has no addresses; those of the one that is there are not for it.
    let has_bridge = line.no_bridge || config.network.bridge.is_some();
    let of_host = || match has_bridge {
        true => pool_of_host(&config, number, roots),
        false => config.network.pool,
    };
    let pool = pool.or_else(|| of_host().map(|pool| pool.to_string()));

    let pairs = Pairs::of(&config)?;
    // The token without its secret: a new token gets new keys.
    let token = line.token.trim();
    let purpose = token.rsplit_once('_').map_or("", |(id, _)| id);
    let words = words(line, purpose);
    if pairs.have_come_for(&words).await? {
        let done = format!("{name} has joined {controller} already with this token");
        return Ok(Done(vec![done]));
    }
    // Before the token is used: what the operator has set is not changed here.
    let new_listen =
        listen_for(config.listen, ip).map_err(|listen| Error::Listen { listen, ip })?;
    // Nor afterwards: only a join changes the network of the sandboxes.
    if !line.no_bridge {
        bridge::check(line.pool, paths, net)?;
    }
    pairs.make_dirs()?;
    // Until the certificates are there, a renewal by the agent that runs must not replace the keys.
    let _locks = pairs.lock().await?;
    let made = [&pairs.agent, &pairs.ingress].map(|files| {
        request(files, name.as_str(), Some(purpose))
            .map_err(|error| Error::File(files.key.clone(), error))
    });
    let [agent_csr, ingress_csr] = made;
    let answer = call::join(
        &controller,
        ca_sha256,
        JoinRequest {
            token: token.to_owned(),
            node: name.to_string(),
            address: address.clone(),
            agent_csr: agent_csr?,
            ingress_csr: ingress_csr?,
            pool: pool.unwrap_or_default(),
            number,
        },
    )
    .await?;

    let mut done = vec![format!("{name} joined {controller}; its agent is to listen on {address}")];
    for (ca, text) in [(&pairs.ca, &answer.ca), (&pairs.ingress_ca, &answer.ingress_ca)] {
        let access = Access { mode: 0o644, group: None };
        replace(ca, text.as_bytes(), access).map_err(|error| Error::File(ca.clone(), error))?;
    }
    // The other nodes dial the address that the cluster has for this one.
    let member = detect::cluster(roots).members.get(&name).and_then(|member| member.ip);
    // Before the certificates: with the agent's own, which comes last, the join is complete.
    let own = settings::Own { ip: member.unwrap_or(ip), listen: new_listen };
    let written = settings::complete(path, &config, &answer, own, line.pool.is_some());
    done.extend(written.map_err(|error| Error::File(path.to_owned(), error))?);
    let note = note(&words, &answer.agent_certificate);
    let noted = replace(&pairs.note(), note.as_bytes(), Access::PRIVATE);
    noted.map_err(|error| Error::File(pairs.note(), error))?;
    let certificates =
        [(&pairs.ingress, &answer.ingress_certificate), (&pairs.agent, &answer.agent_certificate)];
    for (files, certificate) in certificates {
        let failed = |error| Error::File(files.certificate.clone(), error);
        files.install(certificate).map_err(failed)?;
        done.push(format!("wrote {} and its key", files.certificate.display()));
    }
    Ok(Done(done))
}

/// Decides whether the agent needs another listen address, because the controller is to reach it at `ip`. Pure.
///
/// # Errors
/// With the setting of the operator, if it serves none of that family.
fn listen_for(set: Option<SocketAddr>, ip: IpAddr) -> Result<Option<SocketAddr>, SocketAddr> {
    let listen = set.unwrap_or(ALL_IPV4);
    let serves_both = listen.is_ipv6() && listen.ip().is_unspecified();
    match set {
        _ if serves_both || listen.is_ipv4() == ip.to_canonical().is_ipv4() => Ok(None),
        Some(set) => Err(set),
        None => Ok(Some(ALL)),
    }
}

/// Returns the words of a line that what it asks for depends on. `id`: its token, without the secret.
fn words(line: &Line, id: &str) -> String {
    let address = line.address.map(|address| format!(" --address {address}"));
    let pool = line.pool.map(|pool| format!(" --pool {pool}"));
    format!("{id}{}{}", address.unwrap_or_default(), pool.unwrap_or_default())
}

/// Returns the content of the note about a certificate that has come for a line.
fn note(words: &str, certificate: &str) -> String {
    format!("{words}\n{certificate}")
}

/// Locks the files of a certificate; waits for a renewal, which is short.
async fn locked(files: &KeyFiles) -> Result<std::fs::File, Error> {
    let until = Instant::now() + LOCK;
    loop {
        match certificates::locked(files) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy && Instant::now() < until => {
                sleep(LOCK_AGAIN).await;
            }
            done => return done.map_err(|error| Error::File(files.key.clone(), error)),
        }
    }
}

/// Files of both certificates.
struct Pairs {
    agent: KeyFiles,
    ca: PathBuf,
    ingress: KeyFiles,
    ingress_ca: PathBuf,
}

impl Pairs {
    fn of(config: &File) -> Result<Self, Error> {
        let (tls, hop) = (&config.tls, &config.ingress.tls);
        let access = access_of(config.ingress.group.as_deref());
        let access = access.map_err(|error| Error::File(hop.key.clone(), error))?;
        let files = |cert: &Path, key: &Path, access| KeyFiles {
            certificate: cert.to_owned(),
            key: key.to_owned(),
            access,
        };
        Ok(Self {
            agent: files(&tls.cert, &tls.key, Access::PRIVATE),
            ca: tls.ca.clone(),
            ingress: files(&hop.cert, &hop.key, access),
            ingress_ca: hop.ca.clone(),
        })
    }

    /// Makes the directories of the files.
    fn make_dirs(&self) -> Result<(), Error> {
        let (own, hop) = (&self.agent, &self.ingress);
        for path in
            [&own.key, &own.certificate, &self.ca, &hop.key, &hop.certificate, &self.ingress_ca]
        {
            let dir = path.parent().unwrap_or(Path::new("/"));
            let made = DirBuilder::new().recursive(true).mode(0o755).create(dir);
            made.map_err(|error| Error::File(dir.to_owned(), error))?;
        }
        Ok(())
    }

    /// Locks the files of both.
    async fn lock(&self) -> Result<[std::fs::File; 2], Error> {
        Ok([locked(&self.agent).await?, locked(&self.ingress).await?])
    }

    /// Path of the note which line the agent's certificate has come for.
    fn note(&self) -> PathBuf {
        self.agent.certificate.with_added_extension("for")
    }

    /// Returns true when the certificates that are installed have come for a line with these words.
    async fn have_come_for(&self, words: &str) -> Result<bool, Error> {
        let failed = |error| Error::File(self.note(), error);
        let Some(noted) = text::read_if_there(&self.note()).map_err(failed)? else {
            return Ok(false);
        };
        let _locks = self.lock().await?;
        // A certificate may have come whose key is still beside the earlier one.
        for files in [&self.ingress, &self.agent] {
            files.recover().map_err(|error| Error::File(files.key.clone(), error))?;
        }
        let installed = text::read_if_there(&self.agent.certificate).map_err(failed)?;
        Ok(installed.is_some_and(|certificate| noted == note(words, &certificate)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_with_another_address_or_pool_is_another_line_and_its_secret_is_not_noted() {
        let line = Line {
            controller: "https://10.0.0.1".into(),
            token: "pvesj_abc_secret".to_owned().into(),
            ca_sha256: "ab".repeat(32),
            address: None,
            pool: None,
            no_bridge: false,
            node: None,
        };
        assert_eq!(words(&line, "pvesj_abc"), "pvesj_abc");
        let address = Line { address: "10.0.0.3".parse().ok(), ..line.clone() };
        let pool = Line { pool: "10.100.3.0/24".parse().ok(), ..line };
        assert_ne!(words(&address, "pvesj_abc"), words(&pool, "pvesj_abc"));
        assert_eq!(words(&address, "pvesj_abc"), "pvesj_abc --address 10.0.0.3");
    }

    #[test]
    fn agent_of_a_node_that_is_reached_by_ipv6_listens_there_unless_the_operator_has_set_otherwise()
    {
        let decided = |set: &str, ip: &str| {
            let set = (!set.is_empty()).then(|| set.parse().expect("an address"));
            listen_for(set, ip.parse().expect("an address"))
        };
        let (set, all) = ("0.0.0.0:7445", "[::]:7445");
        assert_eq!(decided("", "2001:db8::3"), Ok(Some(all.parse().expect("an address"))));
        assert_eq!(decided(set, "2001:db8::3"), Err(set.parse().expect("an address")));
        for (set, ip) in [
            ("", "10.0.0.3"),
            ("", "::ffff:10.0.0.3"),
            (set, "10.0.0.3"),
            (all, "2001:db8::3"),
            (all, "10.0.0.3"),
            ("[2001:db8::3]:7445", "2001:db8::3"),
        ] {
            assert_eq!(decided(set, ip), Ok(None), "{set:?} at {ip}");
        }
        decided("[2001:db8::3]:7445", "10.0.0.3").expect_err("no IPv4");
    }

    #[tokio::test]
    async fn every_address_of_ipv6_serves_ipv4_too() {
        // As the agent listens.
        let listener = tokio::net::TcpListener::bind((ALL.ip(), 0)).await.expect("IPv6");
        let port = listener.local_addr().expect("bound").port();
        tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("by IPv4");
        tokio::net::TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await.expect("by IPv6");
    }

    #[test]
    fn words_of_the_line_are_checked() {
        let hex = "ab".repeat(32);
        assert_eq!(fingerprint(&hex).expect("hex"), [0xab; 32]);
        let colons = vec!["AB"; 32].join(":");
        assert_eq!(fingerprint(&colons).expect("hex"), [0xab; 32]);
        for bad in ["", "ab", &hex[1..], &format!("{hex}ab"), &format!("{}zz", &hex[2..])] {
            fingerprint(bad).expect_err(bad);
        }
        for (text, expected) in [
            ("https://10.0.0.1:7443", "10.0.0.1:7443"),
            ("https://controller.example/", "controller.example:7443"),
            ("10.0.0.1", "10.0.0.1:7443"),
            ("https://[2001:db8::1]:7443", "[2001:db8::1]:7443"),
            ("https://[2001:db8::1]", "[2001:db8::1]:7443"),
        ] {
            assert_eq!(host_and_port(text).expect(text), expected);
        }
        for bad in ["", "https://", "https://a/b", "https://u@h"] {
            host_and_port(bad).expect_err(bad);
        }
    }
}
