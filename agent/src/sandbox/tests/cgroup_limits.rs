//! Limits in cgroups: in force before anything runs in a sandbox, and again after each boot.

use std::{fs, path::Path};

use futures_util::FutureExt;
use proto::{Invariant, Reason};
use tokio::time::{sleep, timeout};

use super::*;
use crate::{
    pve::{ContainerConfig, HostPaths, IoMax, fake::Limiting, pct::Pct, worker},
    run::Runner,
};

const IO: IoMax =
    IoMax { read_bytes: Some(1 << 20), write_bytes: None, reads: None, writes: Some(100) };

impl Node {
    /// Limits on the use of disks that the kernel holds the container of the record to.
    fn io_max(&self, record: &Record) -> Option<IoMax> {
        self.cluster.guests()[&record.vmid].io_max
    }

    /// Limit that the kernel holds the container of the record to.
    fn processes_max(&self, record: &Record) -> Option<u32> {
        self.cluster.guests()[&record.vmid].processes_max
    }

    /// Ends the boot of a container behind the agent's back, and begins another.
    fn reboots(&self, record: &Record) {
        self.cluster.switch(record.vmid, false);
        self.cluster.switch(record.vmid, true);
        let forgotten = (self.processes_max(record), self.io_max(record));
        assert_eq!(forgotten, (None, None), "the kernel has forgotten them");
    }
}

#[tokio::test(start_paused = true)]
async fn every_boot_is_limited() {
    let set = |options: &mut Options| {
        (options.limits.processes, options.limits.io) = (77, IO);
    };
    let node = Node::with(set, Faults::default()).await;
    let record = node.running(1).await;
    let limits = || (node.processes_max(&record), node.io_max(&record));
    let ours = (Some(77), Some(IO));
    assert_eq!(limits(), ours);

    node.sandboxes.stop(&record.id, LONG).await.expect("stopped");
    node.sandboxes.start(&record.id, LONG).await.expect("started");
    assert_eq!(limits(), ours, "a start");

    node.reboots(&record);
    assert_eq!(node.sandboxes.look_at_boots().await, [id(1)]);
    node.idle().await;
    assert_eq!(limits(), ours, "a reboot from inside");

    node.sandboxes.stop(&record.id, LONG).await.expect("stopped");
    node.cluster.switch(record.vmid, true);
    node.clock.forward(Duration::from_secs(60));
    node.reconcile().await;
    node.idle().await;
    assert_eq!(limits(), ours, "a start by an operator");
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn boot_is_limited_before_anybody_looks_at_it() {
    let node = Node::new().await;
    let record = node.running(1).await;
    let limits = || (node.processes_max(&record), node.io_max(&record));
    let ours = limits();
    let mut watching = Box::pin(Arc::clone(&node.sandboxes).limit_boots());
    assert!((&mut watching).now_or_never().is_none(), "it watches");
    node.reboots(&record);
    assert!((&mut watching).now_or_never().is_none(), "it watches on");
    assert_eq!(limits(), ours);
    assert_eq!(node.record(1).await.boot, 1, "the boot was not looked at");

    // The kernel lets it be limited a moment later.
    node.cluster.set_limiting(Limiting::Fails);
    node.reboots(&record);
    let limited = async {
        node.cluster.set_limiting(Limiting::Works);
        while limits() != ours {
            sleep(Duration::from_millis(1)).await;
        }
    };
    assert!((&mut watching).now_or_never().is_none(), "it tries again");
    tokio::select! {
        () = &mut watching => panic!("it ended"),
        limited = timeout(Duration::from_secs(1), limited) => limited.expect("limited in time"),
    }

    // Other containers have its number: somebody else's, and one that the journal does not know.
    let unknown = crate::pve::Mark { attempt: record.attempt + 1, ..record.mark() };
    for description in [String::new(), unknown.to_string()] {
        let mut other = node.cluster.guests()[&record.vmid].clone();
        other.config = ContainerConfig::parse(b"hostname: somebody\n");
        other.config.set_description(&description).expect("short");
        node.cluster.replace(record.vmid, other);
        node.reboots(&record);
        assert!(timeout(LONG, &mut watching).await.is_err(), "it watches on");
        assert_eq!(limits(), (None, None), "it is not ours");
    }
}

/// The directories stand for cgroups, whose files the kernel would make.
#[tokio::test(start_paused = true)]
async fn new_cgroup_of_a_sandbox_gets_its_limits_and_no_other_does() {
    const SOON: Duration = Duration::from_secs(30);
    let node = Node::new().await;
    let record = node.running(1).await;
    tokio::time::resume();
    let dir = tempfile::tempdir().expect("tempdir");
    let put = |path: &Path, bytes: &[u8]| {
        fs::create_dir_all(path.parent().expect("a directory")).expect("made");
        fs::write(path, bytes).expect("written");
    };
    let mut at = HostPaths::default();
    at.root = dir.path().join("pve");
    at.proc = dir.path().join("proc");
    at.cgroup_root = dir.path().join("cg");
    let config = |vmid: Vmid| at.root.join(format!("nodes/{}/lxc/{vmid}.conf", node.name));
    let own = node.cluster.guests()[&record.vmid].config.to_bytes();
    let (copy, stranger) = (vmid(99_998), vmid(99_999));
    put(&config(record.vmid), &own);
    put(&config(copy), &own);
    put(&config(stranger), b"hostname: somebody\n");
    put(&at.cgroup_root.join("cgroup.controllers"), b"pids\n");
    let runner = Runner::new(dir.path().join("out"), at.proc.clone(), worker::is_task, 1);
    let pct = Pct::new(node.name.clone(), at.clone(), runner.expect("a directory"));
    let sandboxes = Sandboxes::open(
        node.options.clone(),
        Arc::new(pct),
        Arc::clone(&node.journal) as Arc<dyn Journal>,
        Arc::clone(&node.clock) as Arc<dyn Clock>,
        Tasks::default(),
        Faults::default(),
    );
    let sandboxes = sandboxes.await.expect("opens");
    let mut watching = Box::pin(Arc::clone(&sandboxes).limit_boots());
    assert!((&mut watching).now_or_never().is_none(), "it watches");

    let files = ["cgroup.max.descendants", "pids.max"];
    let cgroup = |vmid: Vmid| at.cgroup_root.join("lxc").join(vmid.to_string());
    for vmid in [copy, stranger, record.vmid] {
        files.iter().for_each(|file| put(&cgroup(vmid).join(file), b""));
    }
    let limits = |vmid: Vmid| files.map(|file| fs::read_to_string(cgroup(vmid).join(file)).ok());
    let ours = ["1024".to_owned(), node.options.limits.processes.to_string()].map(Some);
    let limited = async {
        while limits(record.vmid) != ours {
            sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        () = watching => panic!("it ended"),
        limited = timeout(SOON, limited) => limited.expect("limited in time"),
    }
    let none = [Some(String::new()), Some(String::new())];
    assert_eq!((limits(copy), limits(stranger)), (none.clone(), none));
}

#[tokio::test(start_paused = true)]
async fn sandboxes_of_an_older_agent_are_limited_by_the_next_pass() {
    let mut node = Node::new().await;
    node.cluster.set_limiting(Limiting::NoController);
    let record = node.running(1).await;
    node.cluster.set_limiting(Limiting::Works);
    node.restart().await;
    assert_eq!(node.processes_max(&record), None);
    node.reconcile().await;
    assert_eq!(node.processes_max(&record), Some(Limits::default().processes));
}

#[tokio::test(start_paused = true)]
async fn somebody_elses_container_under_the_number_is_not_limited() {
    let node = Node::new().await;
    let record = node.running(1).await;
    let mut other = node.cluster.guests()[&record.vmid].clone();
    other.config = ContainerConfig::parse(b"hostname: somebody\n");
    (other.processes_max, other.io_max) = (None, None);
    node.cluster.replace(record.vmid, other);
    node.sandboxes.enforce_cgroup_limits().await;
    assert_eq!((node.processes_max(&record), node.io_max(&record)), (None, None));
}

#[tokio::test(start_paused = true)]
async fn sandbox_whose_limit_cannot_be_written_does_not_start() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.sandboxes.stop(&record.id, LONG).await.expect("stopped");
    node.cluster.set_limiting(Limiting::Fails);
    let error = node.sandboxes.start(&record.id, LONG).await.expect_err("not limited");
    assert_eq!(error.reason, Reason::LimitsFailed);
    assert_eq!(node.record(1).await.phase, Phase::Stopped);
    let failed = node.create(2).await;
    assert_eq!(failed.phase, Phase::Failed, "{failed:?}");
    assert_eq!(failed.failure.as_ref().map(|why| why.reason), Some(Reason::LimitsFailed));
    node.cluster.set_limiting(Limiting::Works);
    node.sandboxes.start(&record.id, LONG).await.expect("started");
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_runs_without_its_limit_is_a_finding() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.cluster.set_limiting(Limiting::Fails);
    node.reconcile().await;
    let (findings, _) = node.sandboxes.check().await;
    let [finding] = &findings[..] else { panic!("{findings:?}") };
    assert_eq!(finding.invariant, Invariant::Unchecked);
    assert_eq!(finding.subject, record.id.to_string());
    node.cluster.set_limiting(Limiting::Works);
    node.reconcile().await;
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn kernel_without_the_controllers_starts_sandboxes_and_is_a_finding() {
    let node = Node::new().await;
    node.cluster.set_limiting(Limiting::NoController);
    let record = node.running(1).await;
    assert_eq!((node.processes_max(&record), node.io_max(&record)), (None, None));
    let (findings, _) = node.sandboxes.check().await;
    let [io, pids] = &findings[..] else { panic!("{findings:?}") };
    assert_eq!((io.invariant, pids.invariant), (Invariant::Unchecked, Invariant::Unchecked));
    assert!(io.detail.contains("`io`") && pids.detail.contains("`pids`"), "{findings:?}");
}

#[tokio::test(start_paused = true)]
async fn volumes_without_a_device_are_one_finding_until_their_sandboxes_stop() {
    let node = Node::new().await;
    node.cluster.set_limiting(Limiting::NoDevice);
    let (one, two) = (node.running(1).await, node.running(2).await);
    let (findings, _) = node.sandboxes.check().await;
    let [finding] = &findings[..] else { panic!("{findings:?}") };
    assert!(
        finding.detail.contains("of 2 sandboxes") && finding.detail.contains("zfs"),
        "{finding:?}"
    );
    for record in [one, two] {
        node.sandboxes.stop(&record.id, LONG).await.expect("stopped");
    }
    node.reconcile().await;
    node.assert_sound().await;
}
