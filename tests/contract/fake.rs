//! Runs the suite over the in-memory cluster, on paused time: always, and nothing may be skipped.

use std::{
    ffi::OsString,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use agent::{
    pve::{
        Address, Pve,
        fake::{FakeCluster, Fault, Op, Pace, Trouble},
    },
    shim::Host,
};
use proto::{id::Vmid, name::NodeName};

use crate::{
    behaviour::{self, Behaviour},
    stage::{Moment, Shown, Stage},
    suite,
};

struct InMemory {
    cluster: FakeCluster,
    node: NodeName,
    next: AtomicU32,
}

impl InMemory {
    fn new() -> Self {
        let nodes = ["node1", "node2"].map(|name| name.parse::<NodeName>().expect("valid"));
        let cluster = FakeCluster::new(&nodes, Pace::RECORDED, 1);
        let [node, _] = nodes;
        cluster.add_template(&node, template());
        Self { cluster, node, next: AtomicU32::new(100_000) }
    }
}

fn template() -> Vmid {
    Vmid::try_from(9000).expect("in range")
}

#[async_trait::async_trait]
impl Stage for InMemory {
    fn pve(&self) -> Arc<dyn Pve> {
        self.cluster.node(&self.node)
    }

    fn template(&self) -> Vmid {
        template()
    }

    fn fresh(&self) -> Vmid {
        Vmid::try_from(self.next.fetch_add(1, Ordering::Relaxed)).expect("in range")
    }

    fn network(&self) -> (String, Address) {
        let host = u8::try_from(self.next.load(Ordering::Relaxed) % 200).expect("small");
        let (ip, gateway) = (Ipv4Addr::new(10, 100, 1, 20 + host), Ipv4Addr::new(10, 100, 1, 1));
        ("vmbr0".to_owned(), Address::Static { ip, prefix: 24, gateway })
    }

    async fn by_others(&self, vmid: Vmid, description: &str) {
        let template = &self.cluster.guests()[&template()];
        let mut config = template.config.clone();
        config.remove("template");
        config.set_description(description).expect("short");
        self.cluster.add_guest(&self.node, vmid, config, false);
    }

    async fn operator_sets(&self, vmid: Vmid, key: &str, value: &str) {
        self.cluster.edit(&self.node, vmid, |config| {
            if value.is_empty() {
                config.remove(key);
            } else {
                config.set(key, value).expect("one line");
            }
        });
    }

    async fn snapshot(&self, vmid: Vmid) -> Result<(), String> {
        match self.cluster.guests()[&vmid].config.lock() {
            Some(lock) => Err(format!("CT is locked ({lock})")),
            None => Ok(()),
        }
    }

    async fn set_quorate(&self, on: bool) -> bool {
        self.cluster.set_quorate(on);
        true
    }

    async fn set_pmxcfs(&self, on: bool) -> bool {
        self.cluster.set_pmxcfs(&self.node, on);
        true
    }

    async fn kill_next_clone(&self, vmid: Vmid, moment: Moment) -> bool {
        let trouble = match moment {
            Moment::FirstWrite => Trouble::KilledAtOnce,
            // The in-memory cluster mounts nothing.
            Moment::Volume | Moment::Mounted => Trouble::Killed,
        };
        self.cluster.inject(Fault { op: Op::Clone, node: None, vmid: Some(vmid), trouble });
        true
    }

    async fn kill_next_destroy(&self, vmid: Vmid) -> bool {
        let (op, trouble) = (Op::Destroy, Trouble::Killed);
        self.cluster.inject(Fault { op, node: None, vmid: Some(vmid), trouble });
        true
    }

    fn another_life(&self) -> Arc<dyn Pve> {
        self.pve()
    }

    async fn slow_next_clone(&self, _: Vmid) -> bool {
        // At the recorded pace, every clone takes long enough.
        true
    }

    async fn is_shared(&self) -> bool {
        false
    }

    async fn at_rest(&self, _: Vmid) {}

    async fn clean_up(&self) {
        self.cluster.set_quorate(true);
        self.cluster.set_pmxcfs(&self.node, true);
        self.cluster.set_shared(false);
        for vmid in self.cluster.guests().into_keys().filter(|vmid| *vmid != template()) {
            self.cluster.remove(vmid);
        }
        for volume in self.cluster.volumes().into_values().flatten() {
            if !volume.contains("basevol-") {
                self.cluster.free(&volume);
            }
        }
        self.cluster.edit(&self.node, template(), |config| config.remove("lock"));
    }

    async fn share(&self, on: bool) -> bool {
        self.cluster.set_shared(on);
        true
    }

    async fn fetch_back(&self, vmid: Vmid, _: &NodeName) {
        self.cluster.migrate(vmid, &self.node);
    }

    async fn allocate(&self, vmid: Vmid) -> String {
        self.cluster.alloc(&self.node, vmid, 7)
    }

    async fn free(&self, volume: &str) {
        self.cluster.free(volume);
    }

    fn inside(&self, _: Vmid) -> Arc<dyn Host> {
        Arc::new(ThisMachine)
    }

    async fn listen(&self, vmid: Vmid, at: &[SocketAddr]) {
        self.cluster.listen(vmid, at);
    }

    fn calls(&self) -> usize {
        1000
    }

    async fn remove(&self, vmid: Vmid) {
        self.cluster.remove(vmid);
    }
}

/// Host of every container: those of the in-memory cluster run nothing.
#[derive(Debug)]
struct ThisMachine;

impl Host for ThisMachine {
    fn processes(&self) -> Vec<u32> {
        let all = std::fs::read_dir("/proc").expect("procfs").flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| *pid != std::process::id()).collect()
    }

    fn frozen(&self) -> bool {
        false
    }

    fn runs(&self) -> bool {
        true
    }

    fn enter(&self) -> Vec<OsString> {
        ["/usr/bin/env", "-i", "--"].map(OsString::from).into()
    }
}

#[tokio::test(start_paused = true)]
async fn every_behaviour_holds() {
    for (name, show) in behaviour::ALL {
        println!("{name}");
        let stage = InMemory::new();
        assert_eq!(show(&stage).await, Shown::Yes, "{name}");
        let left: Vec<_> = stage.cluster.guests().into_keys().collect();
        assert_eq!(left, [template()], "{name} leaves nothing but the template");
    }
}

/// Behaviours that fail in every way, with good ones before and after.
const BAD: &[Behaviour] = &[
    ("good", |stage| Box::pin(leaves(stage, Shown::Yes))),
    ("skipped", |stage| Box::pin(leaves(stage, Shown::NotHere("a moon")))),
    ("panics", |stage| Box::pin(panics(stage))),
    ("hangs", |stage| Box::pin(hangs(stage))),
    ("good again", |stage| Box::pin(leaves(stage, Shown::Yes))),
];

/// Leaves a container behind and returns `shown`.
async fn leaves(stage: &dyn Stage, shown: Shown) -> Shown {
    assert_eq!(stage.pve().configs().await.expect("list").len(), 1, "the template alone");
    stage.cloned().await;
    shown
}

async fn panics(stage: &dyn Stage) -> Shown {
    let order = stage.cloned().await;
    stage.allocate(order.vmid).await;
    stage.operator_sets(order.vmid, "protection", "1").await;
    stage.set_quorate(false).await;
    panic!("it is not so\nand more of it");
}

async fn hangs(stage: &dyn Stage) -> Shown {
    stage.cloned().await;
    std::future::pending().await
}

#[tokio::test(start_paused = true)]
async fn suite_continues_after_a_failure_and_reports_skipped_and_failed() {
    let stage = InMemory::new();
    let tally = suite::run(&stage, BAD.iter()).await;
    assert_eq!(tally.shown, ["good", "good again"]);
    assert_eq!(
        tally.to_string(),
        "5 behaviours: 2 shown, 1 skipped, 2 failed; skipped skipped: needs a moon; \
         failed panics: it is not so; failed hangs: it hangs"
    );
    let left: Vec<_> = stage.cluster.guests().into_keys().collect();
    assert_eq!(left, [template()], "what they left is removed");
    assert_eq!(stage.cluster.volumes().into_values().flatten().count(), 1);
}
