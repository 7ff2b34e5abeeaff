//! A fake node whose containers can be entered: all of them are this machine, or the container that
//! `PVE_SANDBOX_EXEC_LXC` names, which must run.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use proto::{
    id::{SandboxId, Vmid},
    name::NodeName,
};

use crate::pve::{
    CloneOrder, Cluster, ContainerConfig, Error, Pve, Settings, StorageRoom, Usage, fake::FakePve,
};

/// See the module.
#[derive(Debug)]
pub(super) struct Entered {
    fake: Arc<FakePve>,
    container: Option<String>,
    pub(super) frozen: AtomicBool,
}

impl Entered {
    #[expect(clippy::disallowed_methods, reason = "a test's environment says what it runs on")]
    pub(super) fn new(fake: Arc<FakePve>) -> Self {
        Self {
            fake,
            container: std::env::var("PVE_SANDBOX_EXEC_LXC").ok(),
            frozen: AtomicBool::new(false),
        }
    }

    /// True when this machine stands for the container.
    pub(super) fn is_here(&self) -> bool {
        self.container.is_none()
    }
}

/// All processes in a cgroup and below.
fn listed(dir: &Path, pids: &mut Vec<u32>) {
    let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            listed(&entry.path(), pids);
        }
    }
}

#[async_trait::async_trait]
impl Pve for Entered {
    async fn processes(&self, _: Vmid) -> Vec<u32> {
        let mut pids = Vec::new();
        match &self.container {
            Some(name) => {
                for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
                    listed(&PathBuf::from(root).join(format!("lxc.payload.{name}")), &mut pids);
                }
            }
            None => {
                let all = std::fs::read_dir("/proc").expect("procfs").flatten();
                pids.extend(all.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok()));
                // What stands for `lxc-attach` is outside, and so are we.
                pids.retain(|pid: &u32| {
                    let path = format!("/proc/{pid}/cmdline");
                    let argv = std::fs::read(path).unwrap_or_default();
                    *pid != std::process::id() && !argv.starts_with(b"/bin/bash\0-c\0\"$0\" -i")
                });
            }
        }
        pids
    }

    async fn frozen(&self, vmid: Vmid) -> bool {
        self.frozen.load(Ordering::Relaxed) || self.fake.frozen(vmid).await
    }

    fn enter(&self, _: Vmid) -> Option<Vec<OsString>> {
        let argv: Vec<&str> = match &self.container {
            Some(name) => vec!["/usr/bin/lxc-attach", "-n", name, "--clear-env", "--"],
            // It waits for the command, passes its code on, and does not kill it when it is killed.
            None => vec![
                "/bin/bash",
                "-c",
                "\"$0\" -i PATH=/usr/bin:/bin container=lxc \"$@\"; exit $?",
                "/usr/bin/env",
            ],
        };
        Some(argv.into_iter().map(OsString::from).collect())
    }

    fn node(&self) -> &NodeName {
        self.fake.node()
    }

    async fn cluster(&self) -> Cluster {
        self.fake.cluster().await
    }

    async fn config(&self, vmid: Vmid) -> Result<Option<ContainerConfig>, Error> {
        self.fake.config(vmid).await
    }

    async fn configs(&self) -> Result<BTreeMap<Vmid, ContainerConfig>, Error> {
        self.fake.configs().await
    }

    async fn running(&self, vmid: Vmid) -> bool {
        self.fake.running(vmid).await
    }

    async fn init_pid(&self, vmid: Vmid) -> Option<u32> {
        self.fake.init_pid(vmid).await
    }

    async fn addresses(&self, vmid: Vmid) -> Vec<Ipv4Addr> {
        self.fake.addresses(vmid).await
    }

    async fn storage_room(&self, template: Vmid) -> Result<StorageRoom, Error> {
        self.fake.storage_room(template).await
    }

    async fn volumes(&self, vmid: Vmid) -> Result<Vec<String>, Error> {
        self.fake.volumes(vmid).await
    }

    async fn clone_template(&self, order: &CloneOrder, deadline: Duration) -> Result<(), Error> {
        self.fake.clone_template(order, deadline).await
    }

    async fn configure(&self, vmid: Vmid, settings: &Settings) -> Result<(), Error> {
        self.fake.configure(vmid, settings).await
    }

    async fn start(&self, vmid: Vmid, deadline: Duration) -> Result<(), Error> {
        self.fake.start(vmid, deadline).await
    }

    async fn stop(&self, vmid: Vmid, deadline: Duration) -> Result<(), Error> {
        self.fake.stop(vmid, deadline).await
    }

    async fn destroy_owned(
        &self,
        vmid: Vmid,
        owner: &SandboxId,
        deadline: Duration,
    ) -> Result<(), Error> {
        self.fake.destroy_owned(vmid, owner, deadline).await
    }

    async fn hold(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        self.fake.hold(vmid, owner).await
    }

    async fn release(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        self.fake.release(vmid, owner).await
    }

    async fn freeze(&self, vmid: Vmid, owner: &SandboxId, deadline: Duration) -> Result<(), Error> {
        self.fake.freeze(vmid, owner, deadline).await
    }

    async fn thaw(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        self.fake.thaw(vmid, owner).await
    }

    async fn reclaim(&self, vmid: Vmid, bytes: u64) -> bool {
        self.fake.reclaim(vmid, bytes).await
    }

    async fn usage(&self, vmid: Vmid) -> Option<Usage> {
        self.fake.usage(vmid).await
    }

    async fn unlock_template(&self, template: Vmid) -> Result<(), Error> {
        self.fake.unlock_template(template).await
    }
}
