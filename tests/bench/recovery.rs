//! Recovery after a crash, a check, and the simulation. Needs no lab: an agent in this process uses
//! its journal on the disk and the fake PVE, which takes the recorded times of the real one.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use agent::{
    Agent, Parts,
    journal::{Phase, Pools, Record, SqliteJournal},
    load::HostLoad,
    pve::fake::{FakeCluster, Pace},
    saga::{Faults, When},
    sandbox::{Bridge, Lifetimes, Limits, Options, Order, Probe, Template, exec::shims::NoShims},
};
use anyhow::{Result, anyhow, ensure};
use proto::{
    id::{SandboxId, Vmid},
    name::NodeName,
    spec::{Network, Size, Spec},
};
use tokio::time::{Instant, sleep};

use crate::{
    figures::{Figures, median},
    world::timed,
};

/// Number of sandboxes that the agent knows when it recovers.
const KNOWN: u32 = 200;
/// Number of those whose creation was interrupted after the clone.
const CUT: u32 = 20;
/// Number of those whose deletion was requested and not done.
const DELETED: u32 = 10;
/// Longest recovery.
const RECOVERY: Duration = Duration::from_secs(120);
/// Aim for the recovery, milliseconds.
const RECOVERY_AIM: f64 = 10_000.0;
/// Number of sandboxes in one check.
const CHECKED: u32 = 1000;
/// Rounds of the check.
const CHECKS: usize = 9;
/// Time during which seeds are counted.
const SEEDS: Duration = Duration::from_secs(10);
/// Largest number of seeds.
const SEEDS_MAX: u64 = 100_000;
/// Number of concurrent creations.
const AT_ONCE: u32 = 32;

const TEMPLATE: u32 = 9000;

pub(crate) async fn measure(figures: &mut Figures) -> Result<()> {
    recovery_agent(figures).await?;
    fsck(figures).await?;
    simulation(figures).await
}

/// Measures the time from the start of an agent until all operations are settled.
async fn recovery_agent(figures: &mut Figures) -> Result<()> {
    eprintln!("an agent comes back to {KNOWN} sandboxes");
    let stage = Stage::new()?;
    let agent = stage.start(Faults::default()).await?;
    create(&agent, 0..KNOWN - CUT).await?;
    end(agent).await;
    // An agent whose creations stop after the clone.
    let hook = |_, name: &'static str, when| -> futures_util::future::BoxFuture<'static, ()> {
        if name == "configure" && when == When::Before {
            return Box::pin(std::future::pending());
        }
        Box::pin(std::future::ready(()))
    };
    let agent = stage.start(Faults { hook: Some(Arc::new(hook)), ..Faults::default() }).await?;
    for number in KNOWN - CUT..KNOWN {
        agent.sandboxes().create(order(number)?, Duration::ZERO).await?;
    }
    // Plus one for the template.
    let cloned = || stage.pve.guests().len() == count(KNOWN) + 1;
    until("the creations to stand behind their clones", cloned).await?;
    stage.pve.set_pace(Pace::RECORDED);
    for number in 0..DELETED {
        agent.sandboxes().delete(&id(number), Duration::ZERO).await?;
    }
    let deleting = |record: &Arc<Record>| record.phase == Phase::Deleting;
    let begun = || agent.sandboxes().live().into_iter().filter(deleting).count() == count(DELETED);
    until("the deletions to be recorded", begun).await?;
    end(agent).await;
    let begun = std::time::Instant::now();
    let agent = stage.start(Faults::default()).await?;
    let rest = [Phase::Running, Phase::Paused, Phase::Stopped];
    let settled = || {
        let live = agent.sandboxes().live();
        agent.sandboxes().busy().is_empty() && live.iter().all(|r| rest.contains(&r.phase))
    };
    until("everything to be settled", settled).await?;
    let took = begun.elapsed().as_secs_f64() * 1000.0;
    let left = agent.sandboxes().live().len();
    ensure!(left == count(KNOWN - CUT - DELETED), "{left} sandboxes are left");
    let (findings, _) = agent.sandboxes().check().await;
    ensure!(findings.is_empty(), "{findings:?}");
    end(agent).await;
    let cut = CUT + DELETED;
    let against = format!("the aim, {KNOWN} known, {cut} cut off, fake PVE at the recorded pace");
    figures.add("recovery_agent", took, "ms", &against, RECOVERY_AIM);
    Ok(())
}

/// Measures one check of many sandboxes.
async fn fsck(figures: &mut Figures) -> Result<()> {
    eprintln!("a check of {CHECKED} sandboxes");
    let stage = Stage::new()?;
    let agent = stage.start(Faults::default()).await?;
    create(&agent, 0..CHECKED).await?;
    let mut times = Vec::new();
    for _ in 0..CHECKS {
        let (took, (findings, looked_at)) = timed(agent.sandboxes().check()).await;
        ensure!(findings.is_empty() && looked_at == count(CHECKED), "{findings:?}");
        times.push(took);
    }
    end(agent).await;
    figures.alone("fsck_1000", median(&mut times), "ms");
    Ok(())
}

/// Measures how many stories a core runs.
async fn simulation(figures: &mut Figures) -> Result<()> {
    eprintln!("seeds of the simulation for {SEEDS:?}");
    let counted = tokio::task::spawn_blocking(|| {
        let begun = std::time::Instant::now();
        for seed in 0..SEEDS_MAX {
            if let Err(broken) = simulation::tell(seed, None) {
                return Err(anyhow!("seed {seed}: {broken:?}"));
            }
            if begun.elapsed() > SEEDS {
                return Ok((seed + 1, begun.elapsed()));
            }
        }
        Ok((SEEDS_MAX, begun.elapsed()))
    });
    let (seeds, took) = counted.await??;
    #[expect(clippy::cast_precision_loss, reason = "a count")]
    let per_minute = seeds as f64 / took.as_secs_f64() * 60.0;
    figures.alone("sim_seeds_per_minute", per_minute, "seeds");
    Ok(())
}

/// A node and its disk, which outlive agents.
struct Stage {
    name: NodeName,
    pve: FakeCluster,
    state: tempfile::TempDir,
}

impl Stage {
    fn new() -> Result<Self> {
        let name: NodeName = "n1".parse()?;
        let pve = FakeCluster::new(std::slice::from_ref(&name), Pace::default(), 1);
        pve.add_template(&name, Vmid::try_from(TEMPLATE)?);
        // Beside the program, which is on a disk: /tmp may be in memory.
        let here = std::env::current_exe()?;
        let here = here.parent().unwrap_or(Path::new("."));
        Ok(Self { name, pve, state: tempfile::tempdir_in(here)? })
    }

    async fn start(&self, faults: Faults) -> Result<Arc<Agent>> {
        let load = HostLoad {
            cores: 64.0,
            memory_total: 1 << 40,
            memory_available: 1 << 40,
            ..HostLoad::default()
        };
        let parts = Parts {
            sandboxes: options()?,
            reconcile: agent::reconcile::Options::default(),
            pve: self.pve.node(&self.name),
            journal: Arc::new(self.journal().await?),
            clock: Arc::new(agent::clock::SystemClock::default()),
            host_load: Box::new(move |_, _| load),
            shims: Arc::new(NoShims),
            dhcp: None,
            isolation: None,
            resolver: None,
            faults,
        };
        Ok(Arc::new(Agent::start(parts).await?))
    }

    /// Opens the journal, which the agent before holds until its last thread has ended.
    async fn journal(&self) -> Result<SqliteJournal> {
        let pools = Pools {
            vmids: (Vmid::try_from(100_000)?, Vmid::try_from(101_999)?),
            addresses: ([10, 100, 0, 2].into(), [10, 100, 7, 254].into()),
            address_quarantine_ms: 60_000,
        };
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            match SqliteJournal::open(&self.state.path().join("journal.db"), pools.clone()) {
                Ok(journal) => return Ok(journal),
                Err(error) if Instant::now() >= until => return Err(error.into()),
                Err(_) => sleep(Duration::from_millis(1)).await,
            }
        }
    }
}

fn options() -> Result<Options> {
    Ok(Options {
        templates: vec![Template {
            snapshot: "base_v1".parse()?,
            vmid: Vmid::try_from(TEMPLATE)?,
            size: Size { cpu_cores: 1, memory_mib: 128, disk_gib: 0 },
            probe: Probe::None,
            bridge: None,
            allowed: Default::default(),
            link: Default::default(),
            ports: Default::default(),
        }],
        network: Bridge {
            name: "vmbr0".into(),
            prefix: 21,
            gateway: [10, 100, 0, 1].into(),
            own: Vec::new(),
            dhcp: Default::default(),
        },
        limits: Limits::default(),
        lifetimes: Lifetimes::default(),
        on_reboot: Default::default(),
        labels: Vec::new(),
        number: None,
    })
}

fn id(number: u32) -> SandboxId {
    let mut random = [0; 10];
    random[..4].copy_from_slice(&number.to_be_bytes());
    SandboxId::new(1_700_000_000_000, &random)
}

fn order(number: u32) -> Result<Order> {
    Ok(Order {
        id: id(number),
        team: "bench".parse()?,
        attempt: 1,
        body_digest: "0".repeat(64),
        spec: Spec {
            name: None,
            request_id: format!("r{number}").parse()?,
            snapshot: "base_v1".parse()?,
            size: Size::default(),
            metadata: BTreeMap::new(),
            env: Default::default(),
            network: Network::Static,
            egress: None,
            services: BTreeMap::new(),
            no_default_services: false,
            expose_on_listen: None,
            visibility: Default::default(),
            node: None,
            labels: Default::default(),
            lifetime: proto::lifetime::LifetimePatch::default(),
        },
        port_rules: None,
    })
}

/// Creates the sandboxes, many at a time.
async fn create(agent: &Arc<Agent>, numbers: std::ops::Range<u32>) -> Result<()> {
    let mut left = numbers;
    while !left.is_empty() {
        let mut calls = tokio::task::JoinSet::new();
        for number in left.by_ref().take(AT_ONCE as usize) {
            let (agent, order) = (Arc::clone(agent), order(number)?);
            calls.spawn(async move { agent.sandboxes().create(order, RECOVERY).await });
        }
        while let Some(made) = calls.join_next().await {
            let record = made??;
            ensure!(record.phase == Phase::Running, "{record:?}");
        }
    }
    Ok(())
}

/// Ends the agent as SIGKILL does.
async fn end(agent: Arc<Agent>) {
    agent.kill().await;
}

async fn until(what: &str, done: impl Fn() -> bool) -> Result<()> {
    let end = Instant::now() + RECOVERY;
    while !done() {
        ensure!(Instant::now() < end, "waited {RECOVERY:?} for {what}");
        sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

fn count(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
