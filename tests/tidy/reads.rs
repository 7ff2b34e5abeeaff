//! Nothing is read that others decide the size of, but with a bound.

use crate::source::{files, shipped};

/// Whoever reads a whole file, and why nobody else decides how large that is.
const WHOLE: &[(&str, &str)] = &[
    ("daemon/src/config.rs", "the daemon's own configuration, which root of the host writes"),
    ("daemon/src/tls/mod.rs", "the daemon's own certificates, which root of the host writes"),
    ("controller/src/ca/mod.rs", "the controller's own certificates"),
];

/// Whoever lists a directory, and why that ends. A directory of a container's file system is listed
/// inside of the container alone.
const LISTS: &[(&str, &str)] = &[
    ("agent/src/ingress/listeners.rs", "the descriptors of the host's own processes"),
    ("agent/src/sys/proc.rs", "/proc, where each entry is one process"),
    ("agent/src/pve/block_device.rs", "file systems of btrfs in sysfs, and the disks of each"),
    ("agent/src/pve/cgroup.rs", "cgroups of a container, with a bound"),
    ("agent/src/pve/shim_cgroup.rs", "cgroups of shims, one a container"),
    ("agent/src/pve/pct/mod.rs", "configs of the node's containers in pmxcfs"),
    ("agent/src/pve/storage.rs", "volumes of a storage, which PVE makes"),
    (
        "agent/src/detect.rs",
        "network interfaces of the host, and configs of its containers in pmxcfs",
    ),
    ("agent/src/bridge/mod.rs", "files of ifupdown2 on the host"),
    ("agent/src/dhcp/mod.rs", "network interfaces of the host"),
    ("agent/src/run/mod.rs", "the agent's own directory"),
    ("agent/src/uninstall/mod.rs", "configs of the node's containers in pmxcfs, with a bound"),
    ("agent/src/uninstall/data.rs", "the agent's own directory, with a bound"),
    ("agent/src/uninstall/bridge.rs", "ports of a bridge of the host, with a bound"),
    ("agent/src/node_removal.rs", "directories of the node's keys, which root of the host writes"),
    ("agent/src/sandbox/exec/shims.rs", "the agent's own directory"),
    ("controller/src/audit/opening.rs", "the controller's own directory, with a bound"),
    ("controller/src/setup/ownership.rs", "the controller's own directory, with a bound"),
    ("agent/helper/src/files.rs", "runs inside, as the user who asked"),
    ("sftp/src/files.rs", "runs inside, as the user who asked"),
    ("archive/src/pack.rs", "runs inside, or at the shell, as the user who asked"),
];

const READS: &[&str] = &[
    "fs::read(",
    "read_to_string(",
    "read_to_end(",
    "from_current_process(",
    "Process::new_with_root",
];

/// The statement that ends at `at`: a bound stands in it.
fn statement(code: &str, at: usize) -> &str {
    let start = code[..at].rfind([';', '{', '}']).map_or(0, |end| end + 1);
    &code[start..at]
}

/// Reads without a bound in a file's code.
fn unbounded(code: &str) -> Vec<String> {
    let found = READS.iter().flat_map(|read| code.match_indices(read));
    let free = found.filter(|(at, _)| !statement(code, *at).contains(".take("));
    let line = |at: usize| code[..at].lines().count();
    free.map(|(at, read)| format!("line {}: {read}", line(at))).collect()
}

#[test]
fn reads_have_a_bound() {
    let mut wrong = Vec::new();
    for file in
        ["agent/src", "agent/helper/src", "archive/src", "sftp/src", "controller/src", "daemon/src"]
            .iter()
            .flat_map(|dir| files(dir, &[".rs"]))
    {
        let code = shipped(&file);
        let named = |names: &[(&str, &str)]| names.iter().any(|(path, _)| *path == file.path);
        if !named(WHOLE) {
            wrong.extend(unbounded(&code).into_iter().map(|read| format!("{}: {read}", file.path)));
        }
        if code.contains("read_dir(") && !named(LISTS) {
            wrong.push(format!("{} lists a directory", file.path));
        }
    }
    let why = "use sys::read, or `.take(MAX)` in the same statement; if only root of the host decides \
               the size, name the file in tests/tidy/reads.rs";
    assert!(wrong.is_empty(), "{why}:\n{}", wrong.join("\n"));
}

#[test]
fn every_listed_exception_is_needed() {
    let code = |path: &str| {
        let dir = path.rsplit_once('/').expect("a path").0;
        files(dir, &[".rs"]).iter().find(|file| file.path == path).map(shipped).unwrap_or_default()
    };
    for (path, _) in WHOLE {
        assert!(!unbounded(&code(path)).is_empty(), "{path} has no read without a bound");
    }
    for (path, _) in LISTS {
        assert!(code(path).contains("read_dir("), "{path} lists no directory");
    }
}

#[test]
fn unbounded_read_is_detected() {
    for code in [
        "let a = std::fs::read(path)?;",
        "let a = fs::read_to_string(&path).unwrap_or_default();",
        "let file = File::open(path)?.take(3); file.read_to_end(&mut bytes)?;",
        "(&file).read_to_end(&mut bytes)?;",
        "tokio::fs::read(path).await",
    ] {
        assert_eq!(unbounded(code).len(), 1, "{code}");
    }
    let bounded =
        "let read = File::open(path)?.take(MAX).read_to_end(&mut bytes)?; read::head(a, 3)";
    assert!(unbounded(bounded).is_empty());
}

/// The conversion of `prost_types` overflows for some numbers, and callers choose the numbers.
#[test]
fn durations_of_messages_are_converted_in_one_place() {
    let convert = "Duration::try_from(";
    let mut wrong = Vec::new();
    for file in ["agent/src", "controller/src", "daemon/src", "proto/src", "cli/src"]
        .iter()
        .flat_map(|dir| files(dir, &[".rs"]))
    {
        let code = shipped(&file);
        let to_wire = code.matches("prost_types::Duration::try_from(").count();
        if code.matches(convert).count() > to_wire || code.contains("map(Duration::try_from)") {
            wrong.push(file.path);
        }
    }
    assert!(wrong.is_empty(), "use proto::duration: {wrong:?}");
}
