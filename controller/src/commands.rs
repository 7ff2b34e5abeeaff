//! Command line of `pve-sandbox-controller`.

use std::{
    io::Write,
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use clap::{Parser, Subcommand};
use daemon::{
    doctor::{Report, reach},
    tls::LiveIdentity,
};
use proto::name::NodeName;
use tokio::net::TcpListener;

use crate::{
    Controller, Parts,
    access::ssh_keys,
    audit::{self, Audit, LocalCommand},
    ca::{self, Own, Signer},
    clock::{SystemClock, SystemRandom},
    config::{Config, DATA_DIR},
    doctor,
    enrolment::Settings,
    node::TlsConnector,
    setup::{self, Setup},
    ssh,
    store::{Store, sqlite::Sqlite},
    token_command::TokenCommand,
};

/// Longest wait for the nodes at the start, before the service reports readiness.
const FIRST_CONTACT: Duration = Duration::from_secs(5);

/// Takes what callers ask for and spreads it over the nodes of a cluster.
#[derive(Debug, Parser)]
#[command(name = "pve-sandbox-controller", version, max_term_width = 80)]
pub struct Cli {
    /// Sub-command.
    #[command(subcommand)]
    pub command: Command,
}

/// Sub-commands of the controller.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the API.
    Run {
        /// Configuration file.
        #[arg(
            long,
            env = "PVE_SANDBOX_CONTROLLER_CONFIG",
            default_value = "/etc/pve-sandbox/controller.toml"
        )]
        config: PathBuf,
        /// Listen here instead of where the configuration says.
        #[arg(long)]
        listen: Option<std::net::SocketAddr>,
    },
    /// Make everything that a controller needs on this machine, and start it. What is there already
    /// stays; a second run changes nothing.
    Setup(Box<Setup>),
    /// Make the CA and the controller's certificate. Again: keep the CA, renew the certificate with
    /// the names that it has.
    Init {
        /// Directory of the CA, the database and the audit log.
        #[arg(long, default_value = DATA_DIR)]
        data_dir: PathBuf,
        /// Host names and addresses that callers use, beside localhost and those that the certificate
        /// has already.
        #[arg(long = "name")]
        names: Vec<String>,
    },
    /// The CA that nodes and callers trust.
    Ca {
        /// Sub-command.
        #[command(subcommand)]
        command: CaCommand,
    },
    /// Write the certificates of one node's agent.
    NodeCert {
        /// PVE's name of the node.
        node: NodeName,
        /// Its cluster address.
        #[arg(long)]
        address: Option<IpAddr>,
        /// Folder to write to.
        #[arg(long)]
        out: PathBuf,
        /// Directory of the CA, the database and the audit log.
        #[arg(long, default_value = DATA_DIR)]
        data_dir: PathBuf,
    },
    /// Tokens of callers.
    Token {
        /// Sub-command.
        #[command(subcommand)]
        command: TokenCommand,
        /// Directory of the CA, the database and the audit log.
        #[arg(long, global = true, default_value = DATA_DIR)]
        data_dir: PathBuf,
    },
    /// Read a configuration and say what is wrong with it.
    CheckConfig {
        /// Configuration file.
        #[arg(default_value = "/etc/pve-sandbox/controller.toml")]
        config: PathBuf,
    },
    /// Look at the controller on this machine: what is wrong, and what mends it; exit 1 if something
    /// does not work. It changes nothing.
    Doctor {
        /// Configuration file.
        #[arg(
            long,
            env = "PVE_SANDBOX_CONTROLLER_CONFIG",
            default_value = "/etc/pve-sandbox/controller.toml"
        )]
        config: PathBuf,
        /// Print one object in JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Sub-commands for the CA.
#[derive(Debug, Subcommand)]
pub enum CaCommand {
    /// Make a new CA with the same names in the place of the old one, which is kept beside it, and print
    /// the lines by which the nodes join again: what has a certificate of the old one is refused.
    Rotate(setup::Rotate),
}

impl Command {
    /// Runs the command; returns its exit code.
    ///
    /// # Errors
    /// When the command fails.
    pub async fn execute(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Run { config, listen } => run(&config, listen).await?,
            Self::Setup(setup) => setup.run(&mut say).await.map(drop)?,
            Self::Init { data_dir, names } => {
                let made = audit::recorded(&data_dir, setup::INIT, async {
                    let made = ca::init(&data_dir, &names)?;
                    setup::give_to_owner(&data_dir)?;
                    Ok(made)
                });
                let (files, names) = made.await?;
                say(&format!("the CA is {}", files.ca().display()))?;
                say(&format!("the controller's certificate is for {}", names.join(", ")))?;
            }
            Self::Ca { command: CaCommand::Rotate(rotate) } => rotate.run(&mut say).await?,
            Self::NodeCert { node, address, out, data_dir } => {
                let object = format!("node:{node}");
                let command = LocalCommand { method: "LocalNodeCert", object: &object, owner: "" };
                audit::recorded(&data_dir, command, async {
                    Ok(ca::node(&data_dir, &node, address, &out)?)
                })
                .await?;
                say(&format!("wrote the certificates of {node} to {}", out.display()))?;
            }
            Self::Token { command, data_dir } => {
                let command = command.prepare()?;
                match command.recorded() {
                    Some(told) => {
                        let (object, owner) = (told.object.as_str(), told.owner.as_str());
                        let told = LocalCommand { method: told.method, object, owner };
                        audit::recorded(&data_dir, told, command.run(&data_dir)).await?;
                    }
                    None => command.run(&data_dir).await?,
                }
            }
            Self::CheckConfig { config } => {
                let report = doctor::of_files(&config, &Config::load(&config)?);
                let found = Report::new(report.findings().cloned().collect());
                if !found.checks.is_empty() {
                    say(&found.text())?;
                }
                let works = !found.has_failed();
                anyhow::ensure!(
                    works,
                    "the configuration is valid, but what it names does not work"
                );
                say("the configuration is good")?;
            }
            Self::Doctor { config, json } => {
                let report = doctor::run(&config, Path::new(reach::TIMEDATECTL)).await;
                say(&if json { report.json().to_string() } else { report.text() })?;
                if report.has_failed() {
                    return Ok(ExitCode::FAILURE);
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn say(line: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{line}").context("cannot write to stdout")
}

async fn run(path: &Path, listen: Option<std::net::SocketAddr>) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    daemon::logs::init("info", config.log_json);
    let stop = daemon::stop::signal_token()?;
    if let Err(error) = ca::recover(&config.data_dir) {
        let error = daemon::chain::Chain(&error);
        tracing::error!(%error, "an interrupted rotation of the CA cannot be finished");
    }
    let files = ca::Files::new(&config.data_dir);
    let own = Own { life: config.lives().agent, files };
    let live = own.load().context("cannot load the controller's certificate; was `setup` run?")?;
    let live = callers(live, &config.data_dir, &own.files);
    let server = match (&config.tls.cert, &config.tls.key) {
        (Some(cert), Some(key)) => {
            let public = daemon::tls::Identity::load(cert, key, &own.files.ca())?;
            live.server_beside(daemon::peer::CONTROLLER_NAME, &public)?
        }
        _ => live.server(daemon::tls::ClientAuth::None)?,
    };
    let store: Arc<dyn Store> = Arc::new(Sqlite::open(&config.database())?);
    let address = listen.unwrap_or(config.listen);
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;

    let (dir, options) = (config.audit_dir(), config.audit_options());
    let audit = Audit::open(&dir, Arc::new(SystemClock), options).await?;
    let controller = Controller::start(Parts {
        store,
        audit: audit.clone(),
        connector: Arc::new(TlsConnector::new(live.client()?)),
        clock: Arc::new(SystemClock),
        random: Arc::new(SystemRandom),
        nodes: config.node_options(),
        creates: config.sandbox_options(),
        events: config.event_options(),
        limits: config.limits.clone(),
        urls: config.urls(),
    })
    .await?;
    controller.tell_names(config.ingress.names);
    controller.watch_certificate(live.clone());
    match Signer::load(&config.data_dir, config.lives()) {
        Ok(signer) => controller.enrol(signer, enrolment_settings(&config)?),
        Err(error) => {
            let error = daemon::chain::Chain(&error);
            tracing::error!(%error, "no node can join, and no certificate is renewed: no CA");
        }
    }
    match ca::ClientSigner::load(&config.data_dir) {
        Ok(signer) => controller.certify(signer),
        Err(error) => {
            let error = daemon::chain::Chain(&error);
            tracing::error!(%error, "no client certificate can be made: no CA");
        }
    }
    if let Some((server, listener)) = ssh_server(&config, &controller).await? {
        tokio::spawn(server.serve(listener));
    }
    let renewal = tokio::spawn(own.keep(live, stop.clone()));
    let (ready, all) = controller.settled(FIRST_CONTACT).await;
    let epoch = controller.sandboxes().nodes().epoch.get();
    tracing::info!(%address, nodes = all, ready, epoch, "serving");
    daemon::stop::ready(&format!("{ready} of {all} nodes ready"));

    let incoming = daemon::listen::tls(listener, server, stop.clone());
    let serve = controller.api().serve(incoming, stop.clone().cancelled_owned());
    // Waiting and watching callers are answered first; then their calls end, and serving ends.
    let drain = async {
        stop.cancelled().await;
        controller.stop().await;
    };
    let (served, ()) = tokio::join!(serve, drain);
    // After the last call.
    audit.close().await;
    renewal.await.context("the renewal of the controller's certificate failed")?;
    served.context("serving failed")
}

/// Makes the SSH server and its listener, if the configuration has one.
async fn ssh_server(
    config: &Config,
    controller: &Controller,
) -> anyhow::Result<Option<(ssh::Server, TcpListener)>> {
    let Some(ssh) = &config.ssh else { return Ok(None) };
    let address = ssh.listen;
    let settings = ssh::Settings {
        host: ssh.host.clone(),
        port: ssh.public_port.unwrap_or(address.port()),
        connections_max: ssh.connections_max,
    };
    let key = ssh::host_key::load_or_make(&config.data_dir)?;
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} for SSH"))?;
    let fingerprint = ssh_keys::fingerprint_of(key.public_key());
    tracing::info!(%address, fingerprint, "serving SSH");
    Ok(Some((controller.ssh(key, &settings), listener)))
}

/// Lets callers show certificates of their CA, which is made where an earlier version had none. Without it,
/// callers have bearer tokens only.
fn callers(live: LiveIdentity, data_dir: &Path, files: &ca::Files) -> LiveIdentity {
    if let Err(error) = ca::complete(data_dir) {
        let error = daemon::chain::Chain(&error);
        tracing::error!(%error, "the CA of client certificates cannot be made");
    }
    match live.clone().with_callers(&files.client_ca()) {
        Ok(live) => live,
        Err(error) => {
            tracing::error!(%error, "no client certificate is accepted");
            live
        }
    }
}

/// Returns what nodes that join are told.
fn enrolment_settings(config: &Config) -> anyhow::Result<Settings> {
    let own = [daemon::peer::CONTROLLER_NAME, "localhost", "127.0.0.1", "::1"];
    let mut names = ca::names(&config.data_dir)?;
    names.retain(|name| !own.contains(&name.as_str()));
    let names = setup::best_first(names, config.listen.ip());
    let urls = config.urls();
    Ok(Settings { domain: urls.domain(), https: urls.is_https(), names })
}
