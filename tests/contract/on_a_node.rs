//! Runs the suite over the real driver on this node: a PVE node, or one of the lab. `pct` plays the
//! operator; the stand-in's fault plan, where there is one, causes the faults.

use std::{
    collections::BTreeSet,
    env,
    fs::File,
    io::{BufRead as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use agent::{
    pve::{
        Address, HostPaths, Pve,
        cluster::{Signs, identity},
        pct::Pct,
        storage, worker,
    },
    run::Runner,
    shim::{Container, Host, OUTPUT_BYTES_MAX, Options},
};
use nix::sched::{CloneFlags, setns};
use proto::{id::Vmid, name::NodeName};
use standin::faults::{Action, Rule, write_plan};
use tokio::{process::Command, time::Instant};

use crate::{
    behaviour,
    stage::{DEADLINE, Moment, Stage},
    suite,
};

const STORAGE_CFG: &str = "/etc/pve/storage.cfg";

/// Directory of the stand-in's fault plan.
const CONTROL: &str = "/run/pct-standin";

struct OnANode {
    pct: Pct,
    output: PathBuf,
    template: Vmid,
    bridge: String,
    /// Prefix length and gateway, and the next address.
    addresses: Option<(u8, Ipv4Addr, AtomicU32)>,
    next: AtomicU32,
    /// Numbers that the suite has used; it may touch no others.
    used: Mutex<BTreeSet<Vmid>>,
    /// Servers of the suite in a container. They are closed before it stops: they would keep its network namespace.
    servers: Mutex<Vec<TcpListener>>,
    /// Whether `pct` is the stand-in.
    is_standin: bool,
    /// Whether a process outside does what cannot be done from inside: a line out, a line back.
    has_hand: bool,
    /// Whether that process has cut the node off.
    cut_off: AtomicBool,
    /// Whether every node saw the volumes before the suite began.
    was_shared: bool,
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|text| !text.is_empty())
}

fn pct(output: &Path) -> Pct {
    let places = HostPaths::default();
    let members = std::fs::read(places.root.join(".members")).expect("pmxcfs is mounted");
    let node = identity(&members, Signs::read(&places.root)).expect("pmxcfs names the node").node;
    // At least two: some behaviours need two concurrent calls of `pct`.
    let runner = Runner::new(output.to_owned(), places.proc.clone(), worker::is_task, 4)
        .expect("a directory");
    Pct::new(node, places, runner)
}

impl OnANode {
    fn new(output: &Path) -> Self {
        let number = |name, default: u32| {
            variable(name).map_or(default, |text| text.parse().expect("a vmid"))
        };
        let template = number("PVE_TEST_TEMPLATE", 0);
        let addresses = variable("PVE_TEST_ADDRESS").map(|text| {
            let (ip, gateway) = text.split_once(',').expect("PVE_TEST_ADDRESS=ip/prefix,gateway");
            let (ip, prefix) = ip.split_once('/').expect("PVE_TEST_ADDRESS=ip/prefix,gateway");
            let ip: Ipv4Addr = ip.parse().expect("an address");
            let gateway = gateway.parse().expect("an address");
            (prefix.parse().expect("a length"), gateway, AtomicU32::new(ip.into()))
        });
        Self {
            pct: pct(output),
            output: output.to_owned(),
            template: Vmid::try_from(template).expect("PVE_TEST_TEMPLATE=vmid"),
            bridge: variable("PVE_TEST_BRIDGE").unwrap_or_else(|| "vmbr0".to_owned()),
            addresses,
            next: AtomicU32::new(number("PVE_TEST_VMID", 990_000)),
            used: Mutex::default(),
            servers: Mutex::default(),
            is_standin: variable("PVE_TEST_STANDIN").is_some(),
            has_hand: variable("PVE_TEST_HAND").is_some(),
            cut_off: AtomicBool::new(false),
            was_shared: false,
        }
    }

    /// Returns true once nothing in a container is booting any more.
    async fn has_booted(&self, vmid: Vmid) -> bool {
        let enter = self.pct.enter(vmid).expect("a way in");
        let ask = "systemctl is-system-running 2>/dev/null || true";
        let run = Command::new(&enter[0]).args(&enter[1..]).args(["sh", "-c", ask]).output();
        let Ok(Ok(output)) = tokio::time::timeout(DEADLINE, run).await else { return false };
        let state = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if matches!(state.as_str(), "initializing" | "starting") {
            return false;
        }
        // Without systemd, it is enough that no process starts or ends.
        let before = self.pct.processes(vmid).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        !before.is_empty() && before == self.pct.processes(vmid).await
    }

    /// Removes everything under a number of the suite's, in whatever state a failure has left it.
    async fn remove_all_of(&self, vmid: Vmid) {
        let id = vmid.to_string();
        if let Some(node) = self.pct.cluster().await.guests.get(&vmid)
            && node != self.pct.node()
        {
            self.fetch_back(vmid, node).await;
        }
        for freezer in ["", "/ns"] {
            // Only one of the two may exist; a cgroup that is not frozen stays so.
            drop(std::fs::write(format!("/sys/fs/cgroup/lxc/{id}{freezer}/cgroup.freeze"), "0"));
        }
        if !self.pct.running(vmid).await {
            let rootfs = format!("/var/lib/lxc/{id}/rootfs");
            drop(Command::new("/usr/bin/umount").args(["-R", &rootfs]).output().await);
        }
        let steps: &[&[&str]] = &[
            &["unlock", &id],
            &["set", &id, "--protection", "0"],
            &["destroy", &id, "--force", "1"],
        ];
        for step in steps {
            if self.pct.config(vmid).await.expect("read").is_none() {
                break;
            }
            // A step that is not needed fails; the result is checked below.
            drop(Command::new("/usr/sbin/pct").args(*step).output().await);
        }
        assert_eq!(self.pct.config(vmid).await.expect("read"), None, "CT {vmid} is left");
        for volume in self.pct.volumes(vmid).await.expect("volumes") {
            self.free(&volume).await;
        }
    }

    async fn operator(&self, vmid: Vmid, arguments: &[&str]) {
        assert!(self.used.lock().expect("whole").contains(&vmid), "{vmid} is not the suite's");
        let run = Command::new("/usr/sbin/pct").args(arguments).output().await;
        let output = run.expect("pct runs");
        assert!(output.status.success(), "pct {arguments:?}: {output:?}");
    }

    fn plan(&self, rule: Rule) -> bool {
        if self.is_standin {
            write_plan(Path::new(CONTROL), &[rule]).expect("a fault plan");
        }
        self.is_standin
    }

    /// Sends a request to the process outside.
    fn ask(&self, line: &str) -> bool {
        if !self.has_hand {
            return false;
        }
        println!("\n@{line}");
        std::io::stdout().flush().expect("stdout");
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer).expect("stdin");
        assert_eq!(answer.trim(), "done", "{line}");
        true
    }
}

#[async_trait::async_trait]
impl Stage for OnANode {
    fn pve(&self) -> Arc<dyn Pve> {
        Arc::new(self.pct.clone())
    }

    fn template(&self) -> Vmid {
        self.template
    }

    fn fresh(&self) -> Vmid {
        let guests = std::fs::read_to_string("/etc/pve/.vmlist").expect("readable");
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let vmid = Vmid::try_from(number).expect("in range");
            if !guests.contains(&format!("\"{vmid}\"")) {
                self.used.lock().expect("whole").insert(vmid);
                return vmid;
            }
        }
    }

    fn network(&self) -> (String, Address) {
        let address = self.addresses.as_ref().map(|(prefix, gateway, next)| Address::Static {
            ip: Ipv4Addr::from(next.fetch_add(1, Ordering::Relaxed)),
            prefix: *prefix,
            gateway: *gateway,
        });
        (self.bridge.clone(), address.unwrap_or(Address::Dhcp))
    }

    async fn by_others(&self, vmid: Vmid, description: &str) {
        let (template, id) = (self.template.to_string(), vmid.to_string());
        let clone = ["clone", &template, &id, "--hostname", "others", "--description", description];
        self.operator(vmid, &clone).await;
    }

    async fn operator_sets(&self, vmid: Vmid, key: &str, value: &str) {
        let (id, option) = (vmid.to_string(), format!("--{key}"));
        match (key, value) {
            ("lock", "") => self.operator(vmid, &["unlock", &id]).await,
            _ => self.operator(vmid, &["set", &id, &option, value]).await,
        }
    }

    async fn snapshot(&self, vmid: Vmid) -> Result<(), String> {
        assert!(self.used.lock().expect("whole").contains(&vmid), "{vmid} is not the suite's");
        let mut command = Command::new("/usr/sbin/pct");
        let run = command.args(["snapshot", &vmid.to_string(), "of_the_suite"]).output();
        let output = tokio::time::timeout(DEADLINE, run).await;
        let output = output.expect("it hangs").expect("pct runs");
        if output.status.success() {
            let vmid = vmid.to_string();
            self.operator(vmid.parse().expect("a vmid"), &["delsnapshot", &vmid, "of_the_suite"])
                .await;
            return Ok(());
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn inside(&self, vmid: Vmid) -> Arc<dyn Host> {
        let places = HostPaths::default();
        let enter = places.attach(vmid).into_iter().map(|word| word.to_string_lossy().into_owned());
        let (vmid, enter) = (vmid.get(), enter.collect());
        let nowhere = PathBuf::new();
        let (socket, dir, ids) = (nowhere.clone(), nowhere.clone(), nowhere);
        let (output_bytes_max, limits, io) = (OUTPUT_BYTES_MAX, None, Default::default());
        let options =
            Options { vmid, socket, dir, output_bytes_max, ids, enter, places, limits, io };
        Arc::new(Container::new(&options).expect("a vmid"))
    }

    async fn listen(&self, vmid: Vmid, at: &[SocketAddr]) {
        self.servers.lock().expect("whole").clear();
        if at.is_empty() {
            return;
        }
        let pid = self.pct.init(vmid).await.expect("it runs").pid;
        let namespace = File::open(format!("/proc/{pid}/ns/net")).expect("a namespace");
        let at = at.to_vec();
        // The thread ends with this: nothing else of the suite may run in the namespace.
        let bound = std::thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("entered");
            let servers = at.into_iter().map(|at| TcpListener::bind(at).expect("a free port"));
            servers.collect::<Vec<_>>()
        });
        *self.servers.lock().expect("whole") = bound.join().expect("no panic");
    }

    fn calls(&self) -> usize {
        10_000
    }

    async fn set_quorate(&self, on: bool) -> bool {
        self.cut_off.store(!on, Ordering::Relaxed);
        self.ask(if on { "quorum on" } else { "quorum off" })
    }

    async fn set_pmxcfs(&self, on: bool) -> bool {
        self.cut_off.store(!on, Ordering::Relaxed);
        self.ask(if on { "pmxcfs on" } else { "pmxcfs off" })
    }

    async fn kill_next_clone(&self, vmid: Vmid, moment: Moment) -> bool {
        let step = match moment {
            Moment::FirstWrite => "write-conf",
            Moment::Volume => "write-rootfs",
            Moment::Mounted => "mounted",
        };
        self.plan(Rule::once("clone", step, Action::DieBefore).for_vmid(vmid.get()))
    }

    async fn kill_next_destroy(&self, vmid: Vmid) -> bool {
        self.plan(Rule::once("destroy", "conf", Action::DieBefore).for_vmid(vmid.get()))
    }

    fn another_life(&self) -> Arc<dyn Pve> {
        let output = self.output.join("another-life");
        Arc::new(pct(&output))
    }

    async fn slow_next_clone(&self, vmid: Vmid) -> bool {
        let rule = Rule::once("clone", "write-rootfs", Action::SleepMs).lasting_ms(2000);
        self.plan(rule.for_vmid(vmid.get()))
    }

    async fn is_shared(&self) -> bool {
        let template = self.pct.config(self.template).await.expect("read").expect("the template");
        let text = std::fs::read_to_string(STORAGE_CFG).expect("storage.cfg");
        let storages = storage::parse(&text);
        let shared = |name: &String| storages.iter().any(|s| s.name == *name && s.is_shared());
        template.storages().iter().all(shared)
    }

    /// Shares the volumes only where the disk is the lab's: a PVE node's storage.cfg is not
    /// changed.
    async fn share(&self, on: bool) -> bool {
        if !self.is_standin {
            return false;
        }
        let template = self.pct.config(self.template).await.expect("read").expect("the template");
        let text = std::fs::read_to_string(STORAGE_CFG).expect("storage.cfg");
        let text = set_shared(&text, &template.storages(), on);
        std::fs::write(STORAGE_CFG, text).expect("storage.cfg");
        assert_eq!(self.is_shared().await, on);
        true
    }

    async fn at_rest(&self, vmid: Vmid) {
        let deadline = Instant::now() + DEADLINE;
        while !self.has_booted(vmid).await {
            assert!(Instant::now() < deadline, "the end of its boot: not seen in time");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn clean_up(&self) {
        self.servers.lock().expect("whole").clear();
        if self.is_standin {
            write_plan(Path::new(CONTROL), &[]).expect("a fault plan");
        }
        if self.cut_off.swap(false, Ordering::Relaxed) {
            self.ask("pmxcfs on");
            self.ask("quorum on");
        }
        let deadline = Instant::now() + DEADLINE;
        while !self.pct.cluster().await.quorate {
            assert!(Instant::now() < deadline, "quorum: not seen in time");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        if self.is_standin && !self.was_shared {
            self.share(false).await;
        }
        let guests = self.pct.cluster().await.guests;
        let volumes = self.pct.all_volumes().await.expect("volumes");
        let used = self.used.lock().expect("whole").clone();
        let left = |vmid: &Vmid| guests.contains_key(vmid) || volumes.contains_key(vmid);
        for vmid in used.into_iter().filter(left) {
            self.remove_all_of(vmid).await;
        }
        // A killed clone leaves the lock on the template, which had none.
        let template = self.pct.config(self.template).await.expect("read").expect("the template");
        if template.lock() == Some("disk") {
            self.pct.unlock_template(self.template).await.expect("unlock");
        }
    }

    async fn fetch_back(&self, vmid: Vmid, from: &NodeName) {
        let of = |node: &NodeName| format!("/etc/pve/nodes/{node}/lxc/{vmid}.conf");
        std::fs::rename(of(from), of(self.pct.node())).expect("moved back");
    }

    async fn allocate(&self, vmid: Vmid) -> String {
        let template = self.pct.config(self.template).await.expect("read").expect("the template");
        let storage = template.storage().expect("a storage").to_owned();
        assert!(self.used.lock().expect("whole").contains(&vmid), "{vmid} is not the suite's");
        let arguments = ["alloc", &storage, &vmid.to_string(), "", "4M"];
        let run = Command::new("/usr/sbin/pvesm").args(arguments).output().await;
        let output = run.expect("pvesm runs");
        assert!(output.status.success(), "pvesm {arguments:?}: {output:?}");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let name = text.split('\'').nth(1).unwrap_or_else(|| panic!("{text}"));
        name.to_owned()
    }

    async fn free(&self, volume: &str) {
        let run = Command::new("/usr/sbin/pvesm").args(["free", volume]).output().await;
        let output = run.expect("pvesm runs");
        assert!(output.status.success(), "pvesm free {volume}: {output:?}");
    }

    async fn remove(&self, vmid: Vmid) {
        self.operator(vmid, &["destroy", &vmid.to_string()]).await;
    }
}

/// Describes everything on the node that is not the suite's; it must be the same at the end.
async fn others(stage: &OnANode) -> String {
    let used = stage.used.lock().expect("whole").clone();
    let configs = stage.pct.configs().await.expect("list");
    let mut text = String::new();
    for (vmid, config) in configs.iter().filter(|(vmid, _)| !used.contains(vmid)) {
        let pid = stage.pct.init(*vmid).await;
        text += &format!("{vmid} {pid:?}\n{config:?}\n");
    }
    text
}

#[tokio::test]
async fn every_behaviour_holds() {
    if variable("PVE_TESTS").is_none() {
        println!("SKIPPED: PVE_TESTS=1 PVE_TEST_TEMPLATE=vmid runs this on a PVE node");
        return;
    }
    let output = tempfile::tempdir().expect("tempdir");
    let stage = OnANode::new(output.path());
    let stage = OnANode { was_shared: stage.is_shared().await, ..stage };
    let template = stage.pct.config(stage.template).await.expect("read").expect("the template");
    assert_eq!(template.lock(), None, "somebody works on the template");
    let before = others(&stage).await;
    let only = variable("PVE_TEST_ONLY").unwrap_or_default();
    let chosen = behaviour::ALL.iter().filter(|(name, _)| name.contains(&only));
    let tally = suite::run(&stage, chosen).await;
    let after = others(&stage).await;
    let used = stage.used.lock().expect("whole").clone();
    let left: Vec<_> = stage.pct.configs().await.expect("list").into_keys().collect();
    println!("{tally}");
    assert_eq!(after, before, "what the suite did not make is as it was");
    assert!(left.iter().all(|vmid| !used.contains(vmid)), "{left:?}");
    assert!(tally.failed.is_empty(), "{tally}");
    // In the lab nothing may be skipped.
    let whole = variable("PVE_TEST_WHOLE").is_some();
    assert!(!whole || tally.skipped.is_empty(), "{tally}");
}

/// Returns a `storage.cfg` in which these storages are shared, or are not.
fn set_shared(text: &str, names: &[String], on: bool) -> String {
    let mut changed = String::new();
    let mut within = false;
    for line in text.lines() {
        if !line.starts_with([' ', '\t']) {
            let name = line.split_once(':').map(|(_, name)| name.trim());
            within = name.is_some_and(|name| names.iter().any(|known| known == name));
        } else if within && line.trim().split([' ', '\t']).next() == Some("shared") {
            continue;
        }
        changed += &format!("{line}\n");
        if within && on && !line.starts_with([' ', '\t']) {
            changed += "\tshared 1\n";
        }
    }
    changed
}

#[test]
fn shared_flag_can_be_set_for_every_kind_of_storage() {
    let text = "zfspool: local-zfs\n\tpool rpool/data\n\tcontent rootdir\n\n\
        lvmthin: local-lvm\n\tthinpool data\n\tvgname pve\n\tcontent rootdir,images\n\n\
        dir: raw\n\tpath /srv/raw\n\tshared 0\n\n# of the third\nbtrfs: btr\n\tpath /b\n";
    for name in ["local-zfs", "local-lvm", "raw", "btr"] {
        let names = [name.to_owned()];
        let on = set_shared(text, &names, true);
        let shared: Vec<_> =
            storage::parse(&on).into_iter().filter(|s| s.is_shared()).map(|s| s.name).collect();
        assert_eq!(shared, names, "{on}");
        assert_eq!(set_shared(&on, &names, true), on);
        let off = set_shared(&on, &names, false);
        assert!(storage::parse(&off).iter().all(|storage| !storage.is_shared()), "{off}");
        assert_eq!(off, set_shared(text, &names, false));
    }
    // A storage that is shared by its nature needs no `shared`.
    assert!(storage::parse("rbd: ceph\n\tpool rbd\n\tcontent rootdir\n")[0].is_shared());
}
