//! A foreign container that looks like ours: in our VMID range, with a host name like ours, a tag,
//! and the mark of another container. It must be unchanged after every test.

use std::path::PathBuf;

use lab::Lab;

/// Id within node1's part of the range, which our own assignment would reach.
const VMID: u32 = 100_003;

/// The container, with its fingerprint from its creation.
pub(crate) struct Foreign {
    fingerprint: PathBuf,
}

const FINGERPRINT: &str = r"
set -e
v=VMID
sha256sum < /etc/pve/lxc/$v.conf
pid=$(cat /sys/fs/cgroup/lxc/$v/ns/init.scope/cgroup.procs | head -n 1)
echo init $pid $(cut -d' ' -f22 /proc/$pid/stat)
btrfs subvolume show /rpool/data/subvol-$v-disk-0 2>/dev/null | grep -E 'UUID:|Creation time|Subvolume ID' || stat -c '%i %w' /rpool/data/subvol-$v-disk-0
cat /sys/fs/cgroup/lxc/$v/cgroup.freeze /sys/fs/cgroup/lxc/$v/ns/cgroup.freeze
for f in memory/lxc/$v/memory.limit_in_bytes cpu/lxc/$v/cpu.cfs_quota_us cpu/lxc/$v/cpu.shares; do
  [ ! -e /run/lab/cgroup/$f ] || echo $f $(cat /run/lab/cgroup/$f)
done
cat /proc/$pid/root/etc/machine-id
";

impl Foreign {
    /// Creates the container once per boot of its node; later calls find it.
    pub(crate) fn ensure(lab: &Lab) -> Self {
        let node = lab.node("node1").expect("node1");
        let boot = node.boot_id().expect("boot id");
        let fingerprint = lab.layout().run().join(format!("foreign-{boot}"));
        let foreign = Self { fingerprint };
        if !foreign.fingerprint.exists() {
            let made = node
                .shell(&format!(
                    "set -e; cd /; [ -e /etc/pve/lxc/{VMID}.conf ] || {{ \
                       pct clone 9000 {VMID} --hostname pvelxc-00000000000000000000000000 \
                         --description 'pve-sandbox:v1 id=pvelxc-00000000000000000000000000 \
vmid=100000 attempt=1 team=demo request=r'; \
                       pct set {VMID} --tags pve-sandbox --net0 \
                         name=eth0,bridge=vmbr0,ip=10.100.1.239/24,gw=10.100.1.1; }}; \
                     pct status {VMID} | grep -q running || pct start {VMID}; \
                     for i in $(seq 300); do \
                       pid=$(cat /sys/fs/cgroup/lxc/{VMID}/ns/init.scope/cgroup.procs 2>/dev/null) \
                         && [ -s /proc/$pid/root/etc/machine-id ] && break; sleep 0.1; done"
                ))
                .expect("a shell in node1");
            assert!(
                made.status.success(),
                "the foreign container: {}{}",
                String::from_utf8_lossy(&made.stdout),
                String::from_utf8_lossy(&made.stderr)
            );
            std::fs::write(&foreign.fingerprint, Self::now(lab)).expect("write");
        }
        foreign
    }

    /// Fails if the container has changed.
    #[track_caller]
    pub(crate) fn check(&self, lab: &Lab) {
        let Ok(before) = std::fs::read_to_string(&self.fingerprint) else {
            return; // The test rebooted its node: the next test makes a new fingerprint.
        };
        let boot = lab.node("node1").and_then(|node| node.boot_id()).expect("boot id");
        if self.fingerprint.ends_with(format!("foreign-{boot}")) {
            assert_eq!(Self::now(lab), before, "the foreign container was touched");
        }
    }

    fn now(lab: &Lab) -> String {
        let script = FINGERPRINT.replace("VMID", &VMID.to_string());
        let output = lab.node("node1").and_then(|node| node.shell(&script)).expect("fingerprint");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}
