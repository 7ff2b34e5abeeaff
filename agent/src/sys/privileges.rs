//! Capabilities of the agent and its children: the list of its unit, also when no unit started it.
//! Root keeps much of the host with these; the list excludes what is not needed here: loading
//! modules, rebooting, setting the clock, reading the kernel's log.

use caps::{CapSet, Capability, CapsHashSet, errors::CapsError};

/// Capabilities to keep, each with what needs it: the agent's own code, or a program that it starts. Equal to
/// `CapabilityBoundingSet=` of the unit; a test shows for each what fails without it.
const KEPT: &[(Capability, &str)] = &[
    (
        Capability::CAP_AUDIT_WRITE,
        "su and sudo in a container of a template with `privileged`, which starts from this set",
    ),
    (Capability::CAP_CHOWN, "files for Caddy's group, volumes of containers"),
    (Capability::CAP_DAC_OVERRIDE, "files of containers, which other users own"),
    (Capability::CAP_FOWNER, "modes of files that others own"),
    (Capability::CAP_FSETID, "set-group-id bits of a template's files"),
    (Capability::CAP_IPC_LOCK, "LVM, which locks its memory while it changes a volume"),
    (Capability::CAP_KILL, "ending processes of sandboxes"),
    (Capability::CAP_LINUX_IMMUTABLE, "base images of PVE on directories, which are immutable"),
    (Capability::CAP_MKNOD, "device nodes of volumes"),
    (Capability::CAP_NET_ADMIN, "the rules that isolate sandboxes"),
    (Capability::CAP_NET_BIND_SERVICE, "a port of the agent below 1024, if it is set so"),
    (Capability::CAP_NET_RAW, "seeing the replies of a DHCP server"),
    (Capability::CAP_SETFCAP, "file capabilities in a container's files, and maps of users"),
    (Capability::CAP_SETGID, "becoming a group of a container"),
    (Capability::CAP_SETPCAP, "dropping capabilities"),
    (Capability::CAP_SETUID, "becoming a user of a container"),
    (Capability::CAP_SYS_ADMIN, "mounts, namespaces and cgroups"),
    (Capability::CAP_SYS_CHROOT, "entering the mounts of a container"),
    (Capability::CAP_SYS_NICE, "moving processes of containers between cgroups"),
    (Capability::CAP_SYS_PTRACE, "seeing the namespaces of a container's processes"),
    (Capability::CAP_SYS_RESOURCE, "limits of processes, and reserved blocks of a file system"),
];

/// A capability that is needed and not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// Name of it.
    pub name: String,
    /// Use that fails without it.
    pub needed_for: &'static str,
}

/// Drops all other capabilities permanently; returns those of the list that this process never had. Must be
/// called before any thread starts.
///
/// # Errors
/// When the kernel refuses, which it does not do to root.
pub fn confine() -> Result<Vec<Missing>, CapsError> {
    let bounding = caps::read(None, CapSet::Bounding)?;
    let is_kept = |one: &Capability| KEPT.iter().any(|(kept, _)| kept == one);
    for capability in bounding.into_iter().filter(|capability| !is_kept(capability)) {
        caps::drop(None, CapSet::Bounding, capability)?;
    }
    Ok(missing(&caps::read(None, CapSet::Effective)?))
}

/// Returns what a process lacks of the list; nothing also when it has ended.
pub fn missing_of(pid: u32) -> Vec<Missing> {
    let Ok(pid) = i32::try_from(pid) else { return Vec::new() };
    caps::read(Some(pid), CapSet::Effective).map(|found| missing(&found)).unwrap_or_default()
}

fn missing(found: &CapsHashSet) -> Vec<Missing> {
    let lacks = KEPT.iter().filter(|(capability, _)| !found.contains(capability));
    lacks
        .map(|&(capability, needed_for)| Missing { name: capability.to_string(), needed_for })
        .collect()
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "processes of other users are started")]
mod tests {
    use std::{
        collections::HashSet,
        fs, io,
        os::unix::{
            fs::{MetadataExt as _, PermissionsExt as _, chown},
            process::CommandExt as _,
        },
        path::{Path, PathBuf},
        process::{Child, Command},
    };

    use nix::sched::{CloneFlags, unshare};
    use rustix::{
        fs::{CWD, FileType, IFlags, Mode, XattrFlags},
        net::{AddressFamily, SocketType, sockopt},
    };

    use super::*;

    /// Another user, as those of containers are.
    const OTHER: u32 = 100_000;

    /// Directory with a file of the other user, and a process of that user.
    struct World {
        dir: tempfile::TempDir,
        process: Child,
    }

    impl World {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            let file = dir.path().join("file");
            fs::write(&file, "").expect("written");
            fs::set_permissions(&file, fs::Permissions::from_mode(0o0)).expect("set");
            chown(&file, Some(OTHER), Some(OTHER)).expect("root gives files away");
            let process = Command::new("sleep").arg("60").uid(OTHER).gid(OTHER).spawn();
            Self { dir, process: process.expect("sleep") }
        }

        fn file(&self) -> PathBuf {
            self.dir.path().join("file")
        }

        fn own(&self) -> PathBuf {
            let own = self.dir.path().join("own");
            fs::write(&own, "").expect("written");
            own
        }

        fn process(&self, name: &str) -> PathBuf {
            Path::new("/proc").join(self.process.id().to_string()).join(name)
        }
    }

    impl Drop for World {
        fn drop(&mut self) {
            drop(self.process.kill());
            drop(self.process.wait());
        }
    }

    /// Something that works with a capability, and not without it.
    type Use = fn(&World) -> io::Result<()>;

    const USES: &[(Capability, Use)] = &[
        (Capability::CAP_CHOWN, |world| chown(world.own(), Some(OTHER), None)),
        (Capability::CAP_DAC_OVERRIDE, |world| {
            fs::OpenOptions::new().write(true).open(world.file()).map(drop)
        }),
        (Capability::CAP_FOWNER, |world| {
            fs::set_permissions(world.file(), fs::Permissions::from_mode(0o600))
        }),
        (Capability::CAP_FSETID, |world| {
            let own = world.own();
            chown(&own, None, Some(OTHER))?;
            fs::set_permissions(&own, fs::Permissions::from_mode(0o2755))?;
            // The bit is cleared without a word.
            held(fs::metadata(&own)?.mode() & 0o2000 != 0)
        }),
        (Capability::CAP_KILL, |world| {
            let pid = i32::try_from(world.process.id()).map_err(io::Error::other)?;
            Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None)?)
        }),
        (Capability::CAP_LINUX_IMMUTABLE, |world| {
            let file = fs::File::open(world.own())?;
            rustix::fs::ioctl_setflags(&file, IFlags::APPEND)?;
            Ok(rustix::fs::ioctl_setflags(&file, IFlags::empty())?)
        }),
        (Capability::CAP_MKNOD, |world| {
            let (kind, device) = (FileType::CharacterDevice, rustix::fs::makedev(1, 3));
            let path = world.dir.path().join("null");
            Ok(rustix::fs::mknodat(CWD, path, kind, Mode::RUSR, device)?)
        }),
        (Capability::CAP_NET_ADMIN, |_| {
            let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
            Ok(sockopt::set_socket_recv_buffer_size_force(&socket, 1 << 20)?)
        }),
        (Capability::CAP_NET_BIND_SERVICE, |_| {
            std::net::UdpSocket::bind(("0.0.0.0", 80)).map(drop)
        }),
        (Capability::CAP_NET_RAW, |_| {
            Ok(rustix::net::socket(AddressFamily::PACKET, SocketType::DGRAM, None).map(drop)?)
        }),
        (Capability::CAP_SETFCAP, |world| {
            // Version 2, effective, with no capability in it.
            let mut value = [0_u8; 20];
            value[3] = 2;
            let flags = XattrFlags::empty();
            Ok(rustix::fs::setxattr(world.own(), "security.capability", &value, flags)?)
        }),
        (Capability::CAP_SETGID, |_| run(Command::new("true").gid(OTHER))),
        (Capability::CAP_SETPCAP, |_| {
            caps::drop(None, CapSet::Bounding, Capability::CAP_CHOWN).map_err(io::Error::other)
        }),
        (Capability::CAP_SETUID, |_| run(Command::new("true").uid(OTHER))),
        (Capability::CAP_SYS_ADMIN, |_| Ok(unshare(CloneFlags::CLONE_NEWUTS)?)),
        (Capability::CAP_SYS_CHROOT, |_| Ok(rustix::process::chroot("/")?)),
        (Capability::CAP_SYS_NICE, |_| Ok(rustix::process::nice(-1).map(drop)?)),
        (Capability::CAP_SYS_PTRACE, |world| fs::read_link(world.process("ns/net")).map(drop)),
        (Capability::CAP_SYS_RESOURCE, |_| {
            use rustix::process::{Resource, getrlimit, setrlimit};
            let mut limit = getrlimit(Resource::Msgqueue);
            limit.maximum = limit.maximum.map(|maximum| maximum + 1);
            Ok(setrlimit(Resource::Msgqueue, limit)?)
        }),
    ];

    /// Capabilities that are kept and whose use is not shown here, with the reason.
    const NOT_SHOWN: &[(Capability, &str)] = &[
        (
            Capability::CAP_AUDIT_WRITE,
            "PAM uses it, inside a container without a user namespace of its own",
        ),
        (
            Capability::CAP_IPC_LOCK,
            "mlock is no call of safe Rust; LVM makes it, which no test has",
        ),
    ];

    fn held(holds: bool) -> io::Result<()> {
        if holds { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
    }

    fn run(command: &mut Command) -> io::Result<()> {
        command.spawn()?.wait().map(drop)
    }

    /// Runs a use on a thread of its own, whose capabilities, namespaces and priority end with it.
    fn try_use(world: &World, without: Option<Capability>, use_it: Use) -> io::Result<()> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // Low ports are everybody's in some namespaces, and in none that is new.
                unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_FS)?;
                if let Some(capability) = without {
                    caps::drop(None, CapSet::Effective, capability).map_err(io::Error::other)?;
                }
                use_it(world)
            });
            thread.join().expect("no panic")
        })
    }

    #[test]
    fn each_kept_capability_has_something_that_fails_without_it() {
        let kept: HashSet<_> = KEPT.iter().map(|(capability, _)| *capability).collect();
        let shown = USES.iter().map(|(capability, _)| *capability);
        let tested: HashSet<_> = shown.chain(NOT_SHOWN.iter().map(|(one, _)| *one)).collect();
        assert_eq!(kept, tested, "what is kept has its use here, and nothing else is kept");
        assert!(NOT_SHOWN.iter().all(|(_, why)| why.len() > 20));

        let found = caps::read(None, CapSet::Effective).expect("read");
        let mut shown = 0;
        for (capability, use_it) in USES {
            if !found.contains(capability) {
                eprintln!("not shown: this test has no {capability}");
                continue;
            }
            let world = World::new();
            match try_use(&world, None, *use_it) {
                Ok(()) => {}
                // Not every file system has what is asked.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => continue,
                Err(error) if error.raw_os_error() == Some(25) => continue,
                Err(error) => panic!("{capability}: {error}"),
            }
            let world = World::new();
            let without = try_use(&world, Some(*capability), *use_it);
            assert!(without.is_err(), "{capability} is not needed for its use");
            shown += 1;
        }
        assert!(shown > 12, "only {shown} were shown: is this root?");
    }

    #[test]
    fn missing_capability_is_named_with_its_use() {
        let mut found: CapsHashSet = KEPT.iter().map(|(capability, _)| *capability).collect();
        assert_eq!(missing(&found), []);
        found.remove(&Capability::CAP_NET_RAW);
        let lacks = missing(&found);
        assert_eq!(lacks.len(), 1);
        assert_eq!(lacks[0].name, "CAP_NET_RAW");
        assert!(lacks[0].needed_for.contains("DHCP"), "{lacks:?}");
    }
}
