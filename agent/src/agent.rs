//! Assembles, starts, serves and stops one agent. The same in production, where `production`
//! provides the host, and in the simulation, which provides fakes.

use std::{fmt, sync::Arc, time::Duration};

use proto::id::Vmid;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_stream::Stream;

use crate::{
    certificates::Certificates,
    clock::Clock,
    firewall::{Firewall, Grounds},
    hand_edits::HandEdits,
    journal::Journal,
    load::HostLoad,
    name_directory::NameDirectory,
    pve::Pve,
    reconcile::{self, Reconciler, Waker, garbage::Preview},
    resolver,
    revoked::Revoked,
    rpc::{self, BoxError, Connection, Reporter, Rpc},
    saga::Faults,
    sandbox::{
        self, Sandboxes,
        drift::fsck::Check,
        exec::{Execs, shims::Shims},
        lifecycle::address::DhcpReplies,
        lifetime::expiry_loop::Expiry,
    },
    tasks::Tasks,
};

/// Interval between two samples of the host's load.
const SAMPLE: Duration = Duration::from_secs(1);

/// Reads the host's load; the containers with these vmids are sandboxes.
pub type SampleHost = Box<dyn FnMut(Instant, &[Vmid]) -> HostLoad + Send>;

/// Components of an agent.
pub struct Parts {
    /// Configuration of the sandboxes.
    pub sandboxes: sandbox::Options,
    /// Settings of the reconciler.
    pub reconcile: reconcile::Options,
    /// Proxmox VE on this host.
    pub pve: Arc<dyn Pve>,
    /// Journal, the source of truth.
    pub journal: Arc<dyn Journal>,
    /// Time, and the boot of the host.
    pub clock: Arc<dyn Clock>,
    /// Samples the host's load; called once a second.
    pub host_load: SampleHost,
    /// Shims, which run commands in the sandboxes.
    pub shims: Arc<dyn Shims>,
    /// Replies of the DHCP server, where the configuration allows DHCP.
    pub dhcp: Option<Arc<dyn DhcpReplies>>,
    /// Isolation of the sandboxes, and the addresses that it is about; `None`: it is switched off.
    pub isolation: Option<(Arc<dyn Firewall>, Grounds)>,
    /// Resolver for sandboxes with allow-lists; `None`: there can be none.
    pub resolver: Option<resolver::Settings>,
    /// Injected faults; none outside of tests.
    pub faults: Faults,
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts").field("pve", &self.pve).finish_non_exhaustive()
    }
}

/// Agent that runs: its sandboxes, the service for the controller and the background tasks.
#[derive(Debug)]
pub struct Agent {
    sandboxes: Arc<Sandboxes>,
    execs: Execs,
    rpc: Rpc,
    tasks: Tasks,
    waker: Waker,
}

impl Agent {
    /// Reads the journal and starts the reconciler. Nothing is served yet.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn start(parts: Parts) -> Result<Self, sandbox::Error> {
        let Parts {
            sandboxes,
            reconcile,
            pve,
            journal,
            clock,
            host_load,
            shims,
            dhcp,
            isolation,
            resolver,
            faults,
        } = parts;
        let tasks = Tasks::default();
        let sandboxes =
            Sandboxes::open(sandboxes, pve, journal, clock, tasks.clone(), faults).await?;
        // Before anything else: what runs is isolated from here on.
        if let Some((firewall, grounds)) = isolation {
            let lists = match resolver {
                Some(resolver) => firewall.can_allow(&grounds).await.map(|()| Some(resolver)),
                None => Ok(None),
            };
            sandboxes.isolate_by(firewall, grounds);
            let resolver = lists.unwrap_or_else(|error| {
                tracing::warn!(%error, "no sandbox can have an allow-list");
                None
            });
            if resolver.is_some() {
                sandboxes.expect_resolver();
            }
            sandboxes.enforce_isolation().await;
            // Once the rules have the lists: what they do not allow yet is not opened.
            if let Some(resolver) = resolver {
                let stop = tasks.stopping().clone();
                tasks.spawn(resolver::run(Arc::clone(&sandboxes) as _, resolver, stop));
            }
        }
        // Before sandboxes that need it are started again.
        if let Some(dhcp) = dhcp {
            sandboxes.watch_dhcp(dhcp);
            tasks.spawn(Arc::clone(&sandboxes).follow_dhcp());
        }
        let reconciler = Reconciler::new(Arc::clone(&sandboxes), reconcile.clone());
        let waker = reconciler.waker();
        let garbage = Arc::new(Preview::new(Arc::clone(&sandboxes), reconcile, waker.clone()));
        tasks.spawn(reconciler.run());
        tasks.spawn(Arc::clone(&sandboxes).limit_boots());
        tasks.spawn(Arc::clone(&sandboxes).watch_boots());
        tasks.spawn(Arc::clone(&sandboxes).follow_listeners());
        let (sampled, host) = watch::channel(HostLoad::default());
        sandboxes.watch_host(host.clone());
        tasks.spawn(sample(host_load, Arc::clone(&sandboxes), sampled, tasks.clone()));
        let reporter = Reporter::new(Arc::clone(&sandboxes), host);
        let execs = Execs::new(Arc::clone(&sandboxes), shims);
        tasks.spawn(Expiry::new(Arc::clone(&sandboxes), execs.clone()).run());
        let rpc = Rpc::new(Arc::clone(&sandboxes), execs.clone(), reporter, garbage);
        Ok(Self { sandboxes, execs, rpc, tasks, waker })
    }

    /// Serves `agent.v1` on every connection of `incoming` until the agent is stopped.
    ///
    /// # Errors
    /// When the transport fails as a whole.
    pub async fn serve<C: Connection, E: Into<BoxError>>(
        &self,
        incoming: impl Stream<Item = Result<C, E>>,
    ) -> Result<(), rpc::Error> {
        self.rpc.clone().serve(incoming, self.tasks.stopping().clone()).await
    }

    /// Returns the sandboxes, for exec, the ingress and the tests.
    pub fn sandboxes(&self) -> &Arc<Sandboxes> {
        &self.sandboxes
    }

    /// Returns the service that runs commands.
    pub fn execs(&self) -> &Execs {
        &self.execs
    }

    /// Adds a check to `fsck`.
    pub fn also_check(&self, check: Arc<dyn Check>) {
        self.rpc.also_check(check);
    }

    /// Lets the controller renew these certificates.
    pub fn renew(&self, certificates: Arc<Certificates>) {
        self.rpc.renew(certificates);
    }

    /// Reports these changes by hand to the controller.
    pub fn report_edits(&self, edits: Arc<HandEdits>) {
        self.rpc.report_edits(edits);
    }

    /// Keeps the controller's list of revoked nodes here.
    pub fn keep_revoked(&self, revoked: Arc<Revoked>) {
        self.rpc.keep_revoked(revoked);
    }

    /// Keeps the controller's directory of named sandboxes here.
    pub fn keep_names(&self, directory: Arc<NameDirectory>) {
        self.rpc.keep_names(directory);
    }

    /// Returns the agent's tasks, so that others can end with them.
    pub fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    /// Starts a pass of the reconciler now.
    pub fn wake(&self) {
        self.waker.wake();
    }

    /// Accepts nothing new, and waits at most `patience` for pending operations. The next start
    /// finishes or undoes what is left then.
    pub async fn drain(&self, patience: Duration) {
        if timeout(patience, self.tasks.finish()).await.is_err() {
            let left = self.sandboxes.busy().len();
            tracing::warn!(left, "the agent stopped with pending operations");
        }
    }

    /// Ends all tasks where they stand, as SIGKILL would: for the simulation.
    pub async fn kill(&self) {
        self.tasks.kill().await;
    }
}

async fn sample(
    mut host_load: SampleHost,
    sandboxes: Arc<Sandboxes>,
    sampled: watch::Sender<HostLoad>,
    tasks: Tasks,
) {
    let mut ticks = interval(SAMPLE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while let Some(now) = tasks.stopping().run_until_cancelled(ticks.tick()).await {
        let vmids: Vec<_> = sandboxes.live().iter().map(|record| record.vmid).collect();
        sampled.send_replace(host_load(now, &vmids));
    }
}
