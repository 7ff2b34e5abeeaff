//! The agents of many nodes in one process: the fake agent of the controller's tests, each on its
//! own port with its own certificate from the controller's CA.

use std::{net::SocketAddr, path::Path, sync::Arc};

use anyhow::{Context as _, Result};
use controller::{
    ca,
    node::fake::{FakeAgent, Net},
};
use daemon::tls::{ClientAuth, Identity};
use proto::name::NodeName;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub(super) const SNAPSHOT: &str = "base_v1";
/// Number of vmids of one node.
const VMIDS: usize = 1000;

/// Running agents.
pub(super) struct Fleet {
    agents: Vec<Arc<FakeAgent>>,
    /// Addresses on which they listen.
    pub(super) addresses: Vec<(NodeName, SocketAddr)>,
}

impl Fleet {
    /// Creates the controller's CA below `dir`, and starts `nodes` agents.
    pub(super) async fn start(dir: &Path, nodes: usize) -> Result<Self> {
        ca::init(dir, &[])?;
        let net = Net::new();
        let (mut agents, mut addresses) = (Vec::new(), Vec::new());
        for number in 0..nodes {
            let name: NodeName = format!("node{number:04}").parse()?;
            let files = dir.join("node");
            ca::node(dir, &name, None, &files)?;
            let file = |name: &str| files.join(name);
            let identity = Identity::load(&file("node.crt"), &file("node.key"), &file("ca.crt"))?;
            let config = daemon::tls::server(&identity, ClientAuth::Required)?;
            let listener = TcpListener::bind("127.0.0.1:0").await.context("a port for an agent")?;
            addresses.push((name.clone(), listener.local_addr()?));
            let first_vmid = u32::try_from(100_000 + number * VMIDS)?;
            let agent = FakeAgent::start(&net, name.as_str(), first_vmid, &[SNAPSHOT]);
            // Room for all sandboxes: behaviour on full nodes is another question.
            agent.load(|load| {
                load.cores = 64.0;
                load.memory_total = 1 << 40;
                load.memory_available = 1 << 40;
                load.start_slots = 64;
            });
            agent.faults(|faults| faults.at_once = true);
            let incoming = daemon::listen::tls(listener, config, CancellationToken::new());
            tokio::spawn(agent.clone().serve(incoming));
            agents.push(agent);
        }
        Ok(Self { agents, addresses })
    }

    /// Returns the number of living sandboxes.
    pub(super) fn made(&self) -> usize {
        self.agents.iter().map(|agent| agent.living().len()).sum()
    }
}
