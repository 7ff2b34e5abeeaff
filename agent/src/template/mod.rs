//! Makes the first template of a node: a small Debian with what agents need, checked by starting a
//! clone of it.
//!
//! | step | after a crash |
//! |---|---|
//! | archive by mmdebstrap | the next run removes it |
//! | intent: the vmid, in a file | nothing was made |
//! | `pct create`, with the line of an unfinished template | the next run unlocks and destroys it |
//! | `pct template` | the same |
//! | a clone starts, and its web server answers; the clone is destroyed | the next run destroys both |
//! | the mark that the agent looks for | done |
//!
//! Only containers whose line names their own vmid are ever destroyed, and the one that the intent names while
//! it is nothing but locked by its creation: PVE writes the description last.

mod steps;

use std::{
    collections::BTreeSet,
    fs, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use proto::{
    id::Vmid,
    name::{NodeName, Port, SnapshotId},
};
use tokio::time::Instant;

use self::steps::Host;
use crate::{
    detect,
    pve::{
        ContainerConfig, ErrorKind, HostPaths, pmxcfs,
        template_mark::{self, TemplateMark},
        worker,
    },
    run::Runner,
    sys::{flock, proc, read},
};

/// Packages beside Debian's essential ones.
const PACKAGES: &str = "ca-certificates,curl,dbus,git,ifupdown,iproute2,less,openssh-client,procps,\
                        python3,systemd-sysv";
/// DHCP client, for sandboxes that ask for an address: of the releases that have this one, and of later
/// ones.
const DHCP_CLIENT: (&[&str], &str, &str) =
    (&["bullseye", "bookworm"], "isc-dhcp-client", "dhcpcd-base");
/// Program that is run on the finished root directory.
const CUSTOMISE: &str = include_str!("customise.sh");
/// Longest time for the archive: some 150 packages are loaded and unpacked.
const BUILD: Duration = Duration::from_mins(30);
/// Longest time of one `pct` command; `create` unpacks the archive.
const PCT: Duration = Duration::from_mins(10);
/// First vmid that is tried for a template, and how many are.
const FIRST: u32 = 9000;
const VMIDS: u32 = 900;
/// Vmids that are tried for the template after the archive is built: other nodes take some meanwhile.
const TEMPLATE_VMIDS: u32 = 20;
/// Vmids after the template's that are tried for the clone.
const CLONE_VMIDS: u32 = 20;

/// Debian mirror that Debian itself recommends.
pub const MIRROR: &str = "http://deb.debian.org/debian";
/// Port and path of the web server in a template that mmdebstrap has built.
pub const WWW: &str = "8000/";
/// Size of the root volume, GiB, unless the order says otherwise.
pub const DISK_GIB: u32 = 4;
/// Cores of a sandbox that asks for no number, unless the order says otherwise.
pub const CORES: u32 = 1;
/// Memory of a sandbox that asks for none, MiB, unless the order says otherwise.
pub const MEMORY_MIB: u32 = 512;
/// Longest time until a clone is ready, seconds, unless the order says otherwise.
pub const PATIENCE_S: u64 = 120;

/// Settings of a new template.
#[derive(Debug, Clone)]
pub struct Order {
    /// Its vmid.
    pub vmid: Vmid,
    /// Whether the operator has named the vmid. Otherwise another is taken where this one is taken meanwhile.
    pub is_named: bool,
    /// Name of the snapshot that it becomes.
    pub snapshot: SnapshotId,
    /// Source of its root directory.
    pub source: Source,
    /// Port and path of a web server in it that answers when it is ready, which `curl` in it checks.
    pub http: Option<(Port, String)>,
    /// Longest time until a clone of it is ready.
    pub patience: Duration,
    /// Storage of its root volume.
    pub storage: String,
    /// Size of its root volume, GiB.
    pub disk_gib: u32,
    /// Bridge of its interface; clones get their own.
    pub bridge: String,
    /// Name server of its clones; `None`: that of the node.
    pub name_server: Option<Ipv4Addr>,
    /// Default number of cores of a sandbox.
    pub cores: u32,
    /// Default memory of a sandbox, MiB.
    pub memory_mib: u32,
}

/// Source of a template's root directory.
#[derive(Debug, Clone)]
pub enum Source {
    /// Debian, built by mmdebstrap.
    Debian {
        /// Release: `bookworm`, `trixie`.
        suite: String,
        /// Mirror.
        mirror: String,
    },
    /// An archive that is there: a path, or a volume such as `local:vztmpl/debian-12.tar.zst`.
    Archive(String),
}

/// Result of [`init`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// The template was made, with this vmid.
    Made(Vmid),
    /// The template was there already.
    There,
}

/// Reason why no template was made. What was made until then is removed by the next run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The vmid belongs to something else.
    #[error("container {0} is there and was not made by this command; choose another with --vmid")]
    Taken(Vmid),
    /// A program of an interrupted run still works.
    #[error(
        "a `pct` that an interrupted run has started still works on container {0}: try again later"
    )]
    Running(Vmid),
    /// Another run of this command has not ended.
    #[error("another `template init` is under way on this node")]
    Busy,
    /// No vmid is free.
    #[error("no vmid from {0} on is free for the template")]
    NoVmid(Vmid),
    /// Each vmid that was tried, for the template or for the clone that checks it, is another guest's.
    #[error(
        "{0} vmids were tried from {1} on, and all belong to other guests: try again, or choose one with --vmid"
    )]
    AllTaken(u32, Vmid),
    /// A program failed.
    #[error("{what} failed: {why}")]
    Step {
        /// The step.
        what: &'static str,
        /// Last line that the program printed, or why it could not be started.
        why: String,
    },
    /// The clone did not get ready.
    #[error(
        "a clone of the template started, but did not get ready: {0}. Template {1} is kept and is not \
         used; the next run makes it again"
    )]
    NoAnswer(String, Vmid),
    /// A file could not be read or written.
    #[error("{path}")]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Reason.
        source: io::Error,
    },
}

/// Makes a template, or finds that it is there. `work` is a directory of its own; `say` gets a line
/// before each step.
///
/// # Errors
/// When a step fails, or the vmid is taken.
pub async fn init(
    order: &Order,
    node: &NodeName,
    paths: &HostPaths,
    runner: Runner,
    work: PathBuf,
    say: &dyn Fn(&str),
) -> Result<Done, Error> {
    fs::create_dir_all(&work).map_err(|source| Error::File { path: work.clone(), source })?;
    let lock_file = work.join("lock");
    let lock = flock::lock(&lock_file, Instant::now()).await;
    let lock = lock.map_err(|source| Error::File { path: lock_file, source })?;
    let _lock = lock.ok_or(Error::Busy)?;
    let host = Host { runner, pct: paths.pct.clone(), work };
    let configs = detect::configs(&paths.root, node);
    let begun = host.begun();
    if let Some(config) = configs.get(&order.vmid) {
        let mark = TemplateMark::find(&config.description().unwrap_or_default());
        if config.is_template() && mark.is_some() {
            return Ok(Done::There);
        }
        if !is_left(config, order.vmid, begun) {
            return Err(Error::Taken(order.vmid));
        }
    }
    let is_elsewhere = || taken(&paths.root).contains(&order.vmid);
    if order.is_named && !configs.contains_key(&order.vmid) && is_elsewhere() {
        return Err(Error::Taken(order.vmid));
    }
    // Clones first: a storage does not remove the base of a linked clone.
    let (bases, clones): (Vec<_>, Vec<_>) = configs
        .iter()
        .filter(|(vmid, config)| is_left(config, **vmid, begun))
        .partition(|(_, config)| config.is_template());
    for (vmid, config) in clones.into_iter().chain(bases) {
        if !worker::busy_with(&proc::host_processes(&paths.proc), *vmid).is_empty() {
            return Err(Error::Running(*vmid));
        }
        say(&format!("removing container {vmid}, which an interrupted run has left"));
        if config.lock().is_some() {
            host.unlock(*vmid).await?;
        }
        host.destroy(*vmid).await?;
        if config.get("rootfs").is_none() {
            let storage = &order.storage;
            say(&format!("a volume of it may be left: see `pvesm list {storage} --vmid {vmid}`"));
        }
    }

    let order = match &order.source {
        Source::Debian { suite, mirror } => {
            say(&format!("building Debian {suite} from {mirror}"));
            let archive = host.build(suite, mirror).await?;
            let created = create(&host, order, &archive.display().to_string(), paths, say).await;
            drop(fs::remove_file(&archive));
            created?
        }
        Source::Archive(archive) => create(&host, order, archive, paths, say).await?,
    };
    // From here on the description names it.
    host.end();
    host.make_template(order.vmid).await?;
    let made = detect::configs(&paths.root, node);
    if !made.get(&order.vmid).is_some_and(ContainerConfig::is_template) {
        let why = format!("container {} is no template afterwards", order.vmid);
        return Err(Error::Step { what: "pct template", why });
    }
    say("starting a clone, to see that it works");
    host.check_clone(&order).await?;
    host.describe(&order).await?;
    Ok(Done::Made(order.vmid))
}

/// Creates the container of the template; returns the order with its vmid. The one of the order may have been taken
/// while the archive was built, by the same command on another node for example.
async fn create(
    host: &Host,
    order: &Order,
    archive: &str,
    paths: &HostPaths,
    say: &dyn Fn(&str),
) -> Result<Order, Error> {
    let (mut order, first) = (order.clone(), order.vmid);
    let mut tried = BTreeSet::new();
    for _ in 0..TEMPLATE_VMIDS {
        let vmid = order.vmid;
        say(&format!("creating container {vmid} on {} from {archive}", order.storage));
        host.begin(vmid)?;
        match host.create(&order, archive).await? {
            Ok(()) => return Ok(order),
            Err(ErrorKind::VmidTaken(_)) => host.end(),
            Err(kind) => return Err(Error::Step { what: "pct create", why: kind.to_string() }),
        }
        if order.is_named {
            return Err(Error::Taken(vmid));
        }
        tried.insert(vmid);
        order.vmid = free(&(&taken(&paths.root) | &tried))?;
    }
    Err(Error::AllTaken(TEMPLATE_VMIDS, first))
}

/// Words of the operator that a template of an earlier run may contradict: then another one is made.
#[derive(Debug, Clone, Copy, Default)]
pub struct Named<'a> {
    /// Snapshot.
    pub snapshot: Option<&'a SnapshotId>,
    /// Storage.
    pub storage: Option<&'a str>,
}

impl Named<'_> {
    /// Returns true when a template with this mark is the one that is meant. Pure.
    fn fits(&self, mark: &TemplateMark, config: &ContainerConfig) -> bool {
        self.snapshot.is_none_or(|snapshot| *snapshot == mark.snapshot)
            && self.storage.is_none_or(|storage| config.storage() == Some(storage))
    }
}

/// Chooses the vmid of a template: that of an earlier run of this command on this node, if it has made what is named;
/// else the first from 9000 that nothing in the cluster has.
///
/// # Errors
/// When none is free.
pub fn vmid(pve: &Path, node: &NodeName, named: Named<'_>) -> Result<Vmid, Error> {
    let made = |(vmid, config): &(Vmid, ContainerConfig)| {
        let mark = TemplateMark::find(&config.description().unwrap_or_default());
        let is_it = mark.is_some_and(|mark| named.fits(&mark, config));
        vmid.get() >= FIRST && config.is_template() && (is_it || is_unfinished(config, *vmid))
    };
    let ours = detect::configs(pve, node).into_iter().find(made);
    ours.map_or_else(|| free(&taken(pve)), |(vmid, _)| Ok(vmid))
}

/// Chooses the first vmid from 9000 that is not among these.
fn free(taken: &BTreeSet<Vmid>) -> Result<Vmid, Error> {
    let mut all = (FIRST..FIRST + VMIDS).filter_map(|number| Vmid::try_from(number).ok());
    let free = all.find(|vmid| !taken.contains(vmid));
    free.ok_or_else(|| Error::NoVmid(Vmid::try_from(FIRST).expect("in range")))
}

/// Lists the vmids of all guests of the cluster.
fn taken(pve: &Path) -> BTreeSet<Vmid> {
    let text = read::whole_text(&pve.join(pmxcfs::GUESTS), read::LARGE).unwrap_or_default();
    let list: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let ids = list.get("ids").and_then(serde_json::Value::as_object);
    ids.into_iter().flatten().filter_map(|(id, _)| id.parse().ok()).collect()
}

/// Parses a port and a path, such as `8000/health`.
///
/// # Errors
/// When the text is neither.
pub fn http(text: &str) -> Result<(Port, String), &'static str> {
    let at = text.find('/').ok_or("must be a port and a path, such as 8000/")?;
    let (port, path) = text.split_at(at);
    let port = port.parse().map_err(|_| "must begin with a port, 1 to 65535")?;
    let plain = path.bytes().all(|b| b.is_ascii_graphic());
    plain.then(|| (port, path.to_owned())).ok_or("must be a path of visible ASCII characters")
}

/// Parses the name of a release of Debian.
///
/// # Errors
/// When it has other characters than such names have.
pub fn suite(text: &str) -> Result<String, &'static str> {
    let fits = text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    let fits = fits && !text.is_empty() && !text.starts_with('-');
    fits.then(|| text.to_owned()).ok_or("must be the name of a release, such as bookworm")
}

/// Returns the code name of the node's Debian, such as `bookworm`; `None` when it does not say.
pub fn release() -> Option<String> {
    code_name(&read::whole_text(Path::new("/etc/os-release"), read::LARGE).ok()?)
}

fn code_name(os_release: &str) -> Option<String> {
    let name = os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(name.trim_matches('"').to_owned())
}

/// Line of a container that this command has not finished.
fn unfinished(vmid: Vmid) -> String {
    format!("{} vmid={vmid}", template_mark::UNFINISHED)
}

/// True for a container that was made by this command and has not been finished. Pure.
fn is_unfinished(config: &ContainerConfig, vmid: Vmid) -> bool {
    config.has_note(&unfinished(vmid))
}

/// True for a container that an interrupted run has left. `begun`: the container that it was creating. Pure.
fn is_left(config: &ContainerConfig, vmid: Vmid, begun: Option<Vmid>) -> bool {
    let half_made = || config.lock() == Some("create") && config.description().is_none();
    is_unfinished(config, vmid) || (begun == Some(vmid) && half_made())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// Stand-in for `pct`: another node has all vmids below the number in `below`, and clones lack the program in
    /// `lacks`.
    const PCT: &str = r#"#!/bin/sh
cd "$(dirname "$0")" && echo "$*" >>calls
config=pve/nodes/pve2/lxc/$2.conf
case $1 in
create) [ "$2" -ge "$(cat below)" ] || { echo "CT $2 already exists on node 'pve1'" >&2; exit 255; }
    echo "hostname: debian" >"$config";;
template) echo "template: 1" >>"$config";;
exec) shift 5; [ "$1" != "$(cat lacks)" ] || { echo "no such file: $1" >&2; exit 127; };;
esac
"#;

    /// Node pve2 with that stand-in.
    struct Node(tempfile::TempDir);

    impl Node {
        fn new(below: u32, lacks: &str) -> Self {
            let node = Self(tempfile::tempdir().expect("tempdir"));
            fs::create_dir_all(node.path("pve/nodes/pve2/lxc")).expect("made");
            for (name, text) in [("pct", PCT), ("below", &below.to_string()), ("lacks", lacks)] {
                fs::write(node.path(name), text).expect("written");
            }
            fs::set_permissions(node.path("pct"), fs::Permissions::from_mode(0o755)).expect("set");
            node
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn runner(&self) -> Runner {
            let runner = Runner::new(self.path("output"), self.path("proc"), worker::is_task, 1);
            runner.expect("a directory")
        }

        fn host(&self) -> Host {
            Host { runner: self.runner(), pct: self.path("pct"), work: self.path("work") }
        }

        async fn init(&self, order: &Order) -> Result<Done, Error> {
            let mut paths = HostPaths::default();
            (paths.root, paths.pct, paths.proc) =
                (self.path("pve"), self.path("pct"), self.path("proc"));
            let (node, work) = ("pve2".parse().expect("valid"), self.path("work"));
            init(order, &node, &paths, self.runner(), work, &|_| {}).await
        }

        /// Returns the vmids that were to be created.
        fn created(&self) -> Vec<String> {
            let calls = fs::read_to_string(self.path("calls")).expect("read");
            let words = calls.lines().map(|line| line.split(' ').collect::<Vec<_>>());
            words.filter(|words| words[0] == "create").map(|words| words[1].to_owned()).collect()
        }
    }

    fn order(source: Source, is_named: bool) -> Order {
        Order {
            vmid: Vmid::try_from(9000).expect("in range"),
            is_named,
            snapshot: "debian".parse().expect("valid"),
            source,
            http: None,
            patience: Duration::ZERO,
            storage: "local".into(),
            disk_gib: DISK_GIB,
            bridge: "vmbr1".into(),
            name_server: None,
            cores: CORES,
            memory_mib: MEMORY_MIB,
        }
    }

    fn archive() -> Source {
        Source::Archive("/x.tar".into())
    }

    #[tokio::test]
    async fn next_free_vmid_is_used_where_another_node_took_the_chosen_one() {
        let node = Node::new(9002, "none");
        let done = node.init(&order(archive(), false)).await.expect("made");
        assert_eq!(done, Done::Made(Vmid::try_from(9002).expect("in range")));
        assert_eq!(node.created(), ["9000", "9001", "9002"]);
        assert_eq!(node.host().begun(), None);

        let node = Node::new(9500, "none");
        let error = node.init(&order(archive(), false)).await.expect_err("none is free");
        assert!(error.to_string().starts_with("20 vmids were tried from 9000 on"), "{error}");
        assert_eq!(node.created().len(), 20, "tried so often, and no more");
    }

    #[tokio::test]
    async fn vmid_that_the_operator_named_is_never_replaced() {
        let node = Node::new(9002, "none");
        let error = node.init(&order(archive(), true)).await.expect_err("taken");
        assert!(error.to_string().contains("--vmid"), "{error}");
        assert_eq!(node.created(), ["9000"]);
        assert_eq!(node.host().begun(), None, "what is there is not ours to remove");
    }

    #[tokio::test]
    async fn debian_without_a_promised_program_is_no_template() {
        let debian = || Source::Debian { suite: "trixie".into(), mirror: MIRROR.into() };
        for program in ["git", "curl", "ssh", "python3"] {
            let node = Node::new(0, program);
            let checked = node.host().check_clone(&order(debian(), false)).await;
            let error = checked.expect_err(program).to_string();
            assert!(error.contains(&format!("no such file: {program}")), "{error}");
            let checked = node.host().check_clone(&order(archive(), false)).await;
            checked.expect("an archive has what the operator put into it");
        }
        let node = Node::new(0, "none");
        node.host().check_clone(&order(debian(), false)).await.expect("all are there");
    }

    #[test]
    fn half_made_container_is_known_by_the_intent() {
        let vmid = |number: u32| Vmid::try_from(number).expect("in range");
        let left = |text: &str, begun| {
            is_left(&ContainerConfig::parse(text.as_bytes()), vmid(9000), begun)
        };
        let begun = Some(vmid(9000));
        assert!(left("lock: create\n", begun));
        assert!(!left("lock: create\n", None), "somebody else's");
        assert!(!left("lock: create\n", Some(vmid(9001))), "another one's");
        assert!(!left("#a note\nlock: create\n", begun), "it has a description of its own");
        for other in ["", "hostname: x\n", "lock: backup\n"] {
            assert!(!left(other, begun), "{other:?}");
        }
        let named = "#pve-sandbox-template%3Av1 unfinished vmid=9000\nlock: disk\n";
        assert!(left(named, None));
    }

    #[tokio::test]
    async fn intent_lasts_from_before_the_creation_to_its_end() {
        let dir = tempfile::tempdir().expect("tempdir");
        let work = dir.path().to_owned();
        let runner = Runner::new(work.join("output"), work.clone(), worker::is_task, 1);
        let runner = runner.expect("a directory");
        let host = Host { runner, pct: "/bin/false".into(), work };
        assert_eq!(host.begun(), None);
        let vmid = Vmid::try_from(9000).expect("in range");
        host.begin(vmid).expect("written");
        host.begin(vmid).expect("once more");
        assert_eq!(host.begun(), Some(vmid));
        host.end();
        assert_eq!(host.begun(), None);
    }

    #[test]
    fn release_is_read_from_os_release() {
        let debian = "ID=debian\nVERSION_CODENAME=bookworm\nNAME=\"Debian\"\n";
        assert_eq!(code_name(debian).as_deref(), Some("bookworm"));
        assert_eq!(code_name("VERSION_CODENAME=\"trixie\"\n").as_deref(), Some("trixie"));
        assert_eq!(code_name("ID=debian\n"), None);
    }

    #[test]
    fn port_with_path_and_release_are_parsed() {
        let parsed = |text| http(text).map(|(port, path)| (port.get(), path));
        assert_eq!(parsed("8000/"), Ok((8000, "/".to_owned())));
        assert_eq!(parsed("1/a/b?c"), Ok((1, "/a/b?c".to_owned())));
        for bad in ["", "/", "8000", "0/", "65536/", "8000/a b", "8000/\n", "-1/"] {
            assert!(http(bad).is_err(), "{bad:?}");
        }
        assert!(suite("bookworm").is_ok());
        for bad in ["", "-x", "a/b", "a b", "--help"] {
            assert!(suite(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn vmid_of_the_first_template_is_free_in_the_whole_cluster() {
        let dir = tempfile::tempdir().expect("tempdir");
        let node: NodeName = "pve2".parse().expect("valid");
        let lxc = dir.path().join("nodes/pve2/lxc");
        fs::create_dir_all(&lxc).expect("made");
        let chosen = || vmid(dir.path(), &node, Named::default()).expect("one is free").get();
        assert_eq!(chosen(), 9000);
        let list = r#"{"version":3,"ids":{"9000":{"node":"pve1","type":"lxc"},
            "9001":{"node":"pve1","type":"qemu"}}}"#;
        fs::write(dir.path().join(".vmlist"), list).expect("written");
        assert_eq!(chosen(), 9002);
        let mark = "#pve-sandbox-template%3Av1 snapshot=a cores=1 memory_mib=512\ntemplate: 1\n";
        fs::write(lxc.join("9007.conf"), mark).expect("written");
        assert_eq!(chosen(), 9007, "it is there already");
    }

    #[test]
    fn template_of_another_snapshot_or_storage_is_not_the_one_that_is_named() {
        let dir = tempfile::tempdir().expect("tempdir");
        let node: NodeName = "pve2".parse().expect("valid");
        let lxc = dir.path().join("nodes/pve2/lxc");
        fs::create_dir_all(&lxc).expect("made");
        let mark = "#pve-sandbox-template%3Av1 snapshot=a cores=1 memory_mib=512\n";
        let config = format!("{mark}rootfs: fast:basevol-9000-disk-0,size=4G\ntemplate: 1\n");
        fs::write(lxc.join("9000.conf"), config).expect("written");
        let list = r#"{"ids":{"9000":{"node":"pve2","type":"lxc"}}}"#;
        fs::write(dir.path().join(".vmlist"), list).expect("written");
        let [a, b] = ["a", "b"].map(|name| name.parse().expect("valid"));
        for (snapshot, storage, expected) in [
            (None, None, 9000),
            (Some(&a), Some("fast"), 9000),
            (Some(&b), None, 9001),
            (None, Some("spare"), 9001),
            (Some(&a), Some("spare"), 9001),
        ] {
            let named = Named { snapshot, storage };
            let chosen = vmid(dir.path(), &node, named).expect("one is free").get();
            assert_eq!(chosen, expected, "{named:?}");
        }
    }

    #[test]
    fn only_a_container_that_names_its_own_vmid_is_unfinished() {
        let vmid = |number: u32| Vmid::try_from(number).expect("in range");
        let config =
            |line: &str| ContainerConfig::parse(format!("#{line}\nhostname: x\n").as_bytes());
        let ours = config("pve-sandbox-template%3Av1 unfinished vmid=9000");
        assert!(is_unfinished(&ours, vmid(9000)));
        assert!(!is_unfinished(&ours, vmid(9001)), "somebody cloned it");
        for line in ["a note", "pve-sandbox-template%3Av1 snapshot=a cores=1 memory_mib=512", ""] {
            assert!(!is_unfinished(&config(line), vmid(9000)), "{line}");
        }
    }
}
