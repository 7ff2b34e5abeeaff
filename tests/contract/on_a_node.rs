//! Over the real driver on the node that this runs on: a PVE node, or one of the lab. The operator
//! is played with `pct`, fate with the stand-in's fault plan where there is one.

use std::{
    collections::BTreeSet,
    env,
    io::{BufRead as _, Write as _},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use agent::{
    pve::{
        Address, Pve,
        cluster::identity,
        pct::{Pct, Places},
    },
    run::Runner,
};
use proto::{id::Vmid, name::NodeName};
use standin::faults::{Action, Rule, write_plan};
use tokio::process::Command;

use crate::{
    behaviour,
    stage::{Moment, Shown, Stage},
};

/// Where the stand-in reads its fault plan.
const CONTROL: &str = "/run/pct-standin";

struct OnANode {
    pct: Pct,
    output: PathBuf,
    template: Vmid,
    bridge: String,
    /// Prefix length and gateway, and the next address.
    addresses: Option<(u8, Ipv4Addr, AtomicU32)>,
    next: AtomicU32,
    /// Numbers that the suite has used: all that it may touch.
    used: Mutex<BTreeSet<Vmid>>,
    /// `pct` is the stand-in.
    is_standin: bool,
    /// Somebody outside does what cannot be done from within: a line out, a line back.
    has_hand: bool,
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|text| !text.is_empty())
}

fn pct(output: &Path) -> Pct {
    let places = Places::default();
    let members = std::fs::read(places.root.join(".members")).expect("pmxcfs is mounted");
    let node = identity(&members).expect("pmxcfs names the node").node;
    // Two at least: some behaviours need two calls of `pct` at once.
    let runner = Runner::new(output.to_owned(), places.proc.clone(), 4).expect("a directory");
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
            is_standin: variable("PVE_TEST_STANDIN").is_some(),
            has_hand: variable("PVE_TEST_HAND").is_some(),
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

    /// Asks the one outside.
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
        let output = tokio::time::timeout(crate::stage::DEADLINE, run).await;
        let output = output.expect("it hangs").expect("pct runs");
        if output.status.success() {
            let vmid = vmid.to_string();
            self.operator(vmid.parse().expect("a vmid"), &["delsnapshot", &vmid, "of_the_suite"])
                .await;
            return Ok(());
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    async fn set_quorate(&self, on: bool) -> bool {
        self.ask(if on { "quorum on" } else { "quorum off" })
    }

    async fn set_pmxcfs(&self, on: bool) -> bool {
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

    async fn share(&self, on: bool) -> bool {
        if !self.is_standin {
            return false;
        }
        let file = "/etc/pve/storage.cfg";
        let text = std::fs::read_to_string(file).expect("storage.cfg");
        let mut text = text.replace("\tshared 1\n", "");
        if on {
            text = text.replace("\tpool rpool/data\n", "\tpool rpool/data\n\tshared 1\n");
            assert!(text.contains("shared"), "{text}");
        }
        std::fs::write(file, text).expect("storage.cfg");
        true
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

/// Everything of the node's that is not the suite's, to be the same at the end.
async fn others(stage: &OnANode) -> String {
    let used = stage.used.lock().expect("whole").clone();
    let configs = stage.pct.configs().await.expect("list");
    let mut text = String::new();
    for (vmid, config) in configs.iter().filter(|(vmid, _)| !used.contains(vmid)) {
        let pid = stage.pct.init_pid(*vmid).await;
        text += &format!("{vmid} {pid:?}\n{config:?}\n");
    }
    text
}

#[tokio::test]
async fn every_behaviour() {
    if variable("PVE_TESTS").is_none() {
        println!("SKIPPED: PVE_TESTS=1 PVE_TEST_TEMPLATE=vmid runs this on a PVE node");
        return;
    }
    let output = tempfile::tempdir().expect("tempdir");
    let stage = OnANode::new(output.path());
    let before = others(&stage).await;
    let only = variable("PVE_TEST_ONLY").unwrap_or_default();
    for (name, show) in behaviour::ALL.iter().filter(|(name, _)| name.contains(&only)) {
        println!("{name}");
        match show(&stage).await {
            Shown::Yes => {}
            Shown::NotHere(what) => println!("  SKIPPED: needs {what}"),
        }
    }
    assert_eq!(others(&stage).await, before, "what the suite did not make is as it was");
    let used = stage.used.lock().expect("whole").clone();
    let left: Vec<_> = stage.pct.configs().await.expect("list").into_keys().collect();
    assert!(left.iter().all(|vmid| !used.contains(vmid)), "{left:?}");
}
