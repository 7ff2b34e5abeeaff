//! A node with all that `doctor` looks at, in a root of its own: real certificates of a real controller, the
//! real nft in a network namespace, the real dnsmasq; small programs in place of PVE's and of systemctl.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use agent::{
    bridge::{self, Plan},
    clock::{Clock as _, SystemClock},
    config::Flags,
    doctor::{self, Host},
    tunnel,
};
use daemon::doctor::{Check, Report, State};
use tokio_util::sync::DropGuard;

use crate::{
    node::Node,
    patient::{Patient, assert_root},
    world::World,
};

/// Stands for the program of the clock, which is synchronised unless a file says otherwise.
pub(crate) const TIMEDATECTL: &str = "case \"$1 $2\" in\n\
     'show '*) test -e $ROOT/unsynchronised && echo no || echo yes;;\n\
     'set-ntp true') rm -f $ROOT/unsynchronised $ROOT/behind;;\n\
     *) exit 1;; esac";
/// Time by which the clock of the node is behind while the file `behind` is there, milliseconds.
const BEHIND_MS: u64 = 48 * 3_600_000;

/// Programs of the root: what a remedy runs.
const PROGRAMS: &[(&str, &str)] = &[
    ("lxc-attach", ""),
    ("caddy", ""),
    (
        "pct",
        "conf=$ROOT/pve/nodes/n1/lxc/$2.conf\n\
         case \"$1 $3\" in\n\
         'template ') echo 'template: 1' >> $conf;;\n\
         'set --delete') for key in $(echo $4 | tr , ' '); do\n\
         test $key = description && line='^#' || line=\"^$key:\"; sed -i \"/$line/d\" $conf; done;;\n\
         *) exit 1;; esac",
    ),
    (
        "pvesm",
        "case $1 in\n\
         status) echo 'Name Type Status'; state=active; test -e $ROOT/off && state=inactive\n\
         sed -n \"s/^\\([a-z]*\\): \\([a-z]*\\)/\\2 \\1 $state/p\" $ROOT/pve/storage.cfg;;\n\
         esac",
    ),
    ("sysctl", "echo ${2#*=} > $ROOT/proc/sys/$(echo ${2%%=*} | tr . /)"),
    (
        "ifup",
        "mkdir -p $ROOT/net/$2/bridge\n\
         printf '|-- 10.100.1.1\\n/32 host LOCAL\\n' > $ROOT/proc/net/fib_trie\n\
         grep -q \"^$2\" $ROOT/proc/net/route || \\\n\
         printf '%s\\t0001640A\\t00000000\\t0001\\t0\\t0\\t0\\t00FFFFFF\\t0\\t0\\t0\\n' $2 >> $ROOT/proc/net/route",
    ),
    ("timedatectl", TIMEDATECTL),
    ("modprobe", "rm -f $ROOT/countless"),
    ("apt-get", "test $1 = install && cp $ROOT/bin/caddy $ROOT/bin/lxc-attach"),
    (
        "systemctl",
        "case \"$1 $2\" in\n\
         'restart pve-cluster') echo '{\"nodename\":\"n1\",\"version\":0}' > $ROOT/pve/.members;;\n\
         'restart pve-sandbox-agent') for family in inet bridge; do\n\
         nft add table $family pve_sandbox; done; rm -rf $ROOT/proc/[1-9]*;;\n\
         'is-active pve-sandbox-dns') kill -0 $(cat $ROOT/dns.pid) && echo active || echo activating;;\n\
         'is-active pve-sandbox-agent') echo active;;\n\
         'is-enabled pve-sandbox-agent')\n\
         if test -e $ROOT/disabled; then echo disabled; exit 1; fi; echo enabled;;\n\
         'enable pve-sandbox-agent') rm -f $ROOT/disabled;;\n\
         'restart pve-sandbox-dns') $DNSMASQ --conf-file=/dev/null --port=$DNS_PORT --user=root \\\n\
         --listen-address=127.0.0.1 --bind-interfaces --no-resolv --no-hosts \\\n\
         --pid-file=$ROOT/dns.pid;;\n\
         esac",
    ),
];

const DNSMASQ: &str = "/usr/sbin/dnsmasq";

/// Returns a port that is free for datagrams and connections: dnsmasq takes both.
fn free_port() -> u16 {
    let port = || {
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").ok()?;
        let at = udp.local_addr().ok()?;
        std::net::TcpListener::bind(at).ok().map(|_| at.port())
    };
    (0..100).find_map(|_| port()).expect("a port")
}

/// A joined node whose agent runs.
pub(crate) struct Sick {
    pub(crate) world: World,
    pub(crate) node: Node,
    serving: Option<DropGuard>,
    /// Network namespace of nft.
    namespace: Running,
    dns_port: u16,
}

impl Sick {
    /// Makes a node with which nothing is wrong.
    pub(crate) async fn start() -> Self {
        assert_possible();
        let world = World::start(Duration::from_secs(3600)).await;
        let node = Node::new("n1");
        let dns_port = free_port();
        let mut sick = Self { world, node, serving: None, namespace: namespace(), dns_port };
        sick.files();
        let line = sick.world.line("n1").await;
        sick.node.join(&line).await.expect("it joins");
        sick.start_agent().await;
        let up = "systemctl restart pve-sandbox-agent; systemctl restart pve-sandbox-dns; \
                  nft -f $ROOT/etc/nat.nft";
        sick.sh(up);
        sick
    }

    /// Writes the files of the root.
    fn files(&self) {
        let file = |name: &str| self.node.file(name);
        let write = |name: &str, text: &str| {
            let path = file(name);
            fs::create_dir_all(path.parent().expect("in the root")).expect("made");
            fs::write(path, text).expect("written");
        };
        let pid = self.namespace.0.id();
        let nft = format!(
            "test -e $ROOT/unlisted && exit 1\ntest -e $ROOT/countless && test \"$1\" = -c && exit 1\n\
             exec nsenter --net=/proc/{pid}/ns/net /usr/sbin/nft \"$@\""
        );
        let dnsmasq = format!("exec {DNSMASQ} \"$@\"");
        let own = [("nft", nft.as_str()), ("dnsmasq", dnsmasq.as_str())];
        for (name, text) in PROGRAMS.iter().copied().chain(own) {
            let name = format!("bin/{name}");
            write(&name, &format!("#!/bin/sh\nROOT={}\n{text}\n", self.root().display()));
            let mode = fs::Permissions::from_mode(0o755);
            fs::set_permissions(file(&name), mode).expect("executable");
        }
        write("net/vmbr1/bridge/x", "");
        write("cgroup/cgroup.controllers", "cpu io memory pids\n");
        write("proc/sys/net/ipv4/ip_forward", "1\n");
        write(
            "proc/net/route",
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n\
             vmbr1\t0001640A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n",
        );
        write("proc/net/fib_trie", "|-- 10.100.1.1\n/32 host LOCAL\n");
        write(
            "pve/storage.cfg",
            "zfspool: fast\n\tpool tank\n\tcontent images,rootdir\n\n\
             dir: slow\n\tpath /slow\n\tcontent iso\n\n",
        );
        write(
            "pve/nodes/n1/lxc/9000.conf",
            "hostname: t\nrootfs: fast:basevol-9000-disk-0,size=4G\nunprivileged: 1\ntemplate: 1\n",
        );
        let path = |name: &str| file(name).display().to_string();
        let config = self.node.config();
        let programs = format!(
            "state_dir = \"{}\"\nrun_dir = \"{}\"\n[pve]\npct = \"{}\"\npvesm = \"{}\"\nlxc_attach = \"{}\"\n\
             cgroup_root = \"{}\"\n",
            path("state"),
            path("run"),
            path("bin/pct"),
            path("bin/pvesm"),
            path("bin/lxc-attach"),
            path("cgroup"),
        );
        let config = config.replacen("[pve]\n", &programs, 1);
        let network = "[network]\ngateway = \"10.100.1.1\"\npool = \"10.100.1.0/24\"\n\
                       [limits]\nio_read_mibps = 0\nio_write_mibps = 0\nio_read_iops = 0\nio_write_iops = 0\n\
                       [[template]]\nsnapshot = \"debian\"\nvmid = 9000\n";
        fs::write(file("agent.toml"), format!("{config}{network}")).expect("written");
        let address = "10.100.1.1/24".parse().expect("a network");
        let bridge = bridge::Bridge { name: "vmbr1".into(), address };
        bridge::write(&bridge, &self.host().bridge).expect("written");
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.node.file("")
    }

    pub(crate) fn host(&self) -> Host {
        let (file, config) = (|name: &str| self.node.file(name), self.node.file("agent.toml"));
        Host {
            net: file("net"),
            bridge: bridge::Paths {
                interfaces: file("interfaces"),
                interfaces_d: file("interfaces.d"),
                etc: file("etc"),
                config,
            },
            nft: vec![file("bin/nft").display().to_string()],
            caddy: file("bin/caddy"),
            dnsmasq: file("bin/dnsmasq"),
            name_server: Some(([127, 0, 0, 1], self.dns_port).into()),
            systemctl: file("bin/systemctl"),
            tunnel: Some(tunnel::node::Paths {
                dir: file("tunnel"),
                cloudflared: file("bin/cloudflared"),
                systemctl: file("bin/systemctl"),
                systemd: file("no-systemd"),
                given: file("given"),
            }),
            timedatectl: file("bin/timedatectl"),
            now_ms: file("behind").exists().then(|| SystemClock::default().now_ms() - BEHIND_MS),
        }
    }

    pub(crate) async fn start_agent(&mut self) {
        self.serving = Some(self.node.serve().await);
        self.world.until_ready("n1").await;
    }

    /// Stops the agent, and waits until nothing listens any more.
    pub(crate) async fn stop_agent(&mut self) {
        self.serving = None;
        let closed = async {
            while tokio::net::TcpStream::connect(self.node.address).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), closed).await.expect("it stops");
    }

    pub(crate) async fn report(&self) -> Report {
        let path = self.node.file("agent.toml");
        doctor::run(Some(&path), &Flags::default(), &|_| None, &self.host()).await
    }

    /// Runs `pve-sandbox-agent bridge init`, as its program does, but for the unit of the name server.
    pub(crate) fn bridge_init(&self) -> Result<Plan, bridge::Error> {
        let host = self.host();
        let plan = bridge::plan(None, &host.bridge, &host.net)?;
        if let Plan::Make(bridge) = &plan {
            bridge::write(bridge, &host.bridge)?;
            self.sh(&format!("ifup --force {}; nft -f $ROOT/etc/nat.nft", bridge.name));
        }
        Ok(plan)
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.node.file(name).display().to_string()
    }
}

impl Patient for Sick {
    fn programs(&self) -> String {
        self.path("bin")
    }

    fn variables(&self) -> Vec<(&'static str, String)> {
        vec![
            ("ROOT", self.path("")),
            ("DNS_PORT", self.dns_port.to_string()),
            ("DNSMASQ", DNSMASQ.to_owned()),
        ]
    }

    async fn findings(&self) -> Vec<Check> {
        let findings = self.report().await.checks.into_iter();
        findings.filter(|check| check.state != State::Ok).collect()
    }

    /// Runs a remedy word for word.
    async fn run(&self, remedy: &str) {
        match remedy {
            "pve-sandbox-agent bridge init" => {
                self.bridge_init().expect("a bridge is made");
            }
            _ => self.sh(remedy),
        }
    }
}

/// Process that is ended with the test.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Fails where it has ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Drop for Sick {
    fn drop(&mut self) {
        let pid = fs::read_to_string(self.node.file("dns.pid")).unwrap_or_default();
        if let Ok(pid) = pid.trim().parse() {
            let pid = nix::unistd::Pid::from_raw(pid);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).ok();
        }
    }
}

/// Starts a network namespace, which lives as long as its process.
fn namespace() -> Running {
    let child =
        Command::new("unshare").args(["--net", "sleep", "300"]).stdin(Stdio::null()).spawn();
    let child = Running(child.expect("unshare"));
    let path = format!("/proc/{}/ns/net", child.0.id());
    let own = fs::read_link("/proc/self/ns/net").expect("proc");
    // Until `unshare` has become `sleep`, the namespace is the test's.
    let deadline = Instant::now() + Duration::from_secs(10);
    while !fs::read_link(&path).is_ok_and(|other| other != own) {
        assert!(Instant::now() < deadline, "`unshare --net` has made no namespace");
        std::thread::sleep(Duration::from_millis(2));
    }
    child
}

/// Checks that these tests can run here.
fn assert_possible() {
    assert_root();
    let programs = [DNSMASQ, "/usr/sbin/nft", "/usr/bin/unshare", "/usr/bin/nsenter"];
    let missing: Vec<_> = programs.iter().filter(|path| !Path::new(path).exists()).collect();
    assert!(missing.is_empty(), "`make packages` installs what this test needs: {missing:?}");
}
