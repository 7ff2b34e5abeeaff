//! The network: one namespace with a bridge that joins the nodes, and two links for each node.
//! Nothing of it is in the machine's own namespace.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};

use crate::layout::{BRIDGE, HUB_IP, NETNS, NodeId};
use crate::run::{run, run_command, run_line};

/// Directory of the names of network namespaces, as `ip netns` knows it.
const NAMES: &str = "/run/netns";

/// Returns the file that names the namespace.
pub fn netns_file() -> PathBuf {
    Path::new(NAMES).join(NETNS)
}

/// Recreates the namespace and its bridge. `ip netns` finds it by its name.
pub fn make() -> Result<()> {
    remove()?;
    make_names(Path::new(NAMES))?;
    let file = netns_file();
    File::create(&file).context("cannot name the network namespace")?;
    run("unshare", [format!("--net={}", file.display()).as_str(), "true"])?;
    for line in [
        "link set lo up".to_owned(),
        format!("link add {BRIDGE} type bridge"),
        format!("addr add {HUB_IP}/24 dev {BRIDGE}"),
        format!("link set {BRIDGE} up"),
    ] {
        ip_in_lab(&line)?;
    }
    Ok(())
}

/// Makes the directory of names a shared mount of its own, as `ip netns add` does. Otherwise the first
/// `ip netns add` beside the lab would mount it over itself, and cover the lab's name.
fn make_names(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    let none = None::<&str>;
    let share = || mount(none, dir, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none);
    let bind = || mount(Some(dir), dir, none, MsFlags::MS_BIND | MsFlags::MS_REC, none);
    let shared = match share() {
        // It is no mount yet.
        Err(Errno::EINVAL) => bind().and_then(|()| share()),
        shared => shared,
    };
    shared.with_context(|| format!("cannot make {} a mount", dir.display()))
}

/// Removes the namespace, or only its name if a reboot removed the namespace.
pub fn remove() -> Result<()> {
    remove_name(Path::new(NAMES), NETNS)
}

fn remove_name(dir: &Path, name: &str) -> Result<()> {
    let file = dir.join(name);
    loop {
        if !file.exists() {
            break;
        }
        match umount2(&file, MntFlags::MNT_DETACH) {
            // There may be another one below it.
            Ok(()) => continue,
            // A plain file that is left from before a reboot, or that has nothing on it any more.
            Err(Errno::EINVAL) => {}
            Err(errno) => return Err(errno).context("cannot let go of the network namespace"),
        }
        match fs::remove_file(&file) {
            // The name is in use below a mount that covers the directory.
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
                umount2(dir, MntFlags::empty()).with_context(|| {
                    let dir = dir.display();
                    format!(
                        "another mount covers {dir}: remove the namespaces in it that are not the lab's \
                         (`ip netns del`), then `umount {dir}`"
                    )
                })?;
            }
            removed => removed.context("cannot remove the network namespace")?,
        }
    }
    // Without names the mount serves nobody; whoever adds a namespace makes it again.
    while fs::read_dir(dir).is_ok_and(|mut names| names.next().is_none())
        && umount2(dir, MntFlags::empty()).is_ok()
    {}
    Ok(())
}

/// Links the node's namespace, in which this process is, to the other nodes and creates the bridge
/// for its containers.
pub fn link_node(node: NodeId) -> Result<()> {
    let (name, number) = (node.name(), node.number());
    // The link of the node's last boot may disappear slightly later than the node.
    drop(ip_in_lab(&format!("link del {name}")));
    for line in [
        "link set lo up".to_owned(),
        format!(
            "link add eth0 address 02:99:00:00:00:{number:02x} type veth peer name {name} netns {NETNS}"
        ),
        format!("addr add {}/24 dev eth0", node.ip()),
        "link set eth0 up".to_owned(),
        format!("link add vmbr0 address 02:64:00:00:00:{number:02x} type bridge"),
        format!("addr add {}.1/24 dev vmbr0", node.containers_net()),
        "link set vmbr0 up".to_owned(),
        format!("route add default via {HUB_IP}"),
    ] {
        run_line(&format!("ip {line}"))?;
    }
    ip_in_lab(&format!("link set {name} master {BRIDGE} up"))?;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("cannot switch forwarding on")
}

/// Runs `ip` in the lab's namespace. `ip -n` does not work in a chroot: it needs `/` to be a mount.
pub fn ip_in_lab(line: &str) -> Result<String> {
    run_in_lab("ip", line.split_ascii_whitespace())
}

/// Runs a program in the lab's namespace.
#[expect(unsafe_code, reason = "what a child does to itself before exec goes through pre_exec")]
pub fn run_in_lab<'a>(program: &str, args: impl IntoIterator<Item = &'a str>) -> Result<String> {
    let netns = File::open(netns_file()).context("the lab's network is not there")?;
    let mut command = Command::new(program);
    command.args(args);
    // SAFETY: the only call in the child is a plain system call on a descriptor opened before.
    unsafe { command.pre_exec(move || Ok(setns(&netns, CloneFlags::CLONE_NEWNET)?)) };
    run_command(&mut command)
}

#[cfg(test)]
mod tests {
    use nix::sched::unshare;

    use super::*;

    const NONE: Option<&str> = None;

    /// Runs in a mount namespace of its own; only root can have one.
    fn apart(work: impl FnOnce(&Path) + Send + 'static) {
        assert!(
            nix::unistd::geteuid().is_root(),
            "run this test as root: it makes a mount namespace"
        );
        let in_there = move || {
            unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
            mount(NONE, "/", NONE, MsFlags::MS_PRIVATE | MsFlags::MS_REC, NONE).expect("private");
            let dir = tempfile::tempdir().expect("a directory");
            work(&dir.path().canonicalize().expect("a path").join("netns"));
        };
        std::thread::spawn(in_there).join().expect("no assertion failed");
    }

    /// Names this thread's network namespace, as `unshare --net=FILE` and `ip netns add` do.
    fn name(dir: &Path, name: &str) {
        let file = dir.join(name);
        File::create(&file).expect("made");
        let own = "/proc/self/ns/net";
        mount(Some(own), &file, NONE, MsFlags::MS_BIND, NONE).expect("named");
    }

    fn mounts(dir: &Path) -> usize {
        let text = fs::read_to_string("/proc/thread-self/mountinfo").expect("proc");
        crate::mounts::below(&crate::mounts::parse(&text), dir).len()
    }

    #[test]
    fn namespaces_of_others_neither_cover_the_labs_nor_are_removed() {
        apart(|dir| {
            make_names(dir).expect("made");
            name(dir, "lab");
            // What `ip netns add` does first changes nothing now.
            make_names(dir).expect("there");
            name(dir, "other");
            assert_eq!(mounts(dir), 3);
            remove_name(dir, "lab").expect("removed");
            assert!(!dir.join("lab").exists() && dir.join("other").exists());
            assert_eq!(mounts(dir), 2, "the other one and the directory");
            remove_name(dir, "lab").expect("nothing to do");
            remove_name(dir, "other").expect("removed");
            assert_eq!(mounts(dir), 0);
        });
    }

    #[test]
    fn name_below_a_mount_that_covers_it_is_removed_unless_others_are_there() {
        apart(|dir| {
            // A lab that did not make the mount, and then `ip netns add other`.
            fs::create_dir_all(dir).expect("made");
            name(dir, "lab");
            make_names(dir).expect("stacked");
            name(dir, "other");
            assert_eq!(mounts(dir), 4);
            let error = remove_name(dir, "lab").expect_err("the other one is in use");
            assert!(format!("{error:#}").contains("ip netns del"), "{error:#}");
            umount2(&dir.join("other"), MntFlags::MNT_DETACH).expect("unmounted");
            fs::remove_file(dir.join("other")).expect("removed");
            remove_name(dir, "lab").expect("removed");
            assert_eq!(mounts(dir), 0);
            assert!(!dir.join("lab").exists());
        });
    }
}
