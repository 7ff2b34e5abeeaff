//! Who may know whom: edge -> domain -> host, one direction.

use std::collections::{BTreeMap, BTreeSet};

use crate::source::{File, code, files, names, read, shipped, shipped_with_strings};

/// A module, and the modules of its crate that it may name.
type Rule = (&'static str, &'static [&'static str]);

/// Rules of the agent, from the edge down to the host.
const AGENT: &[Rule] = &[
    (
        "agent",
        &[
            "certificates",
            "clock",
            "firewall",
            "hand_edits",
            "journal",
            "load",
            "name_directory",
            "pve",
            "reconcile",
            "resolver",
            "revoked",
            "rpc",
            "saga",
            "sandbox",
            "tasks",
        ],
    ),
    (
        "rpc",
        &[
            "certificates",
            "hand_edits",
            "journal",
            "load",
            "name_directory",
            "pve",
            "revoked",
            "sandbox",
        ],
    ),
    (
        "ingress",
        &[
            "clock",
            "hand_edits",
            "journal",
            "name_directory",
            "pve",
            "revoked",
            "run",
            "sandbox",
            "sys",
        ],
    ),
    ("hand_edits", &["sys"]),
    ("name_directory", &["sys"]),
    ("revoked", &["sys"]),
    ("reconcile", &["journal", "pve", "sandbox"]),
    ("resolver", &["firewall", "sandbox"]),
    ("certificates", &[]),
    ("dhcp", &["sandbox", "sys"]),
    ("join", &["bridge", "certificates", "config", "detect", "pve", "rpc"]),
    ("config", &["clock", "detect", "firewall", "journal", "load", "pve", "sandbox"]),
    (
        "sandbox",
        &["clock", "firewall", "journal", "load", "pve", "run", "saga", "shim", "sys", "tasks"],
    ),
    ("shim", &["pve", "run", "sys"]),
    ("firewall", &["run", "sys"]),
    ("journal", &["clock", "pve"]),
    ("saga", &[]),
    ("tasks", &[]),
    ("load", &["pve", "sys"]),
    ("detect", &["pve", "sys"]),
    ("bridge", &["config", "detect", "pve"]),
    ("caddy_settings", &["config", "ingress"]),
    ("commands", &["config", "join", "template", "tunnel", "uninstall"]),
    (
        "doctor",
        &[
            "bridge",
            "caddy_settings",
            "clock",
            "config",
            "detect",
            "firewall",
            "hand_edits",
            "ingress",
            "pve",
            "sandbox",
            "sys",
            "tunnel",
        ],
    ),
    ("template", &["detect", "pve", "run", "sys"]),
    ("tunnel", &["clock", "config", "hand_edits", "ingress", "journal", "run"]),
    ("uninstall", &["pve", "sys"]),
    ("pve", &["run", "sys"]),
    ("clock", &["sys"]),
    ("run", &["sys"]),
    ("sys", &[]),
];

/// Rules of the controller: placement is pure, the store knows nobody, the nodes' client does not
/// know who asks.
const CONTROLLER: &[Rule] = &[
    (
        "commands",
        &[
            "audit",
            "ca",
            "clock",
            "config",
            "doctor",
            "enrolment",
            "inventory",
            "node",
            "access",
            "rpc",
            "setup",
            "ssh",
            "store",
            "token_command",
        ],
    ),
    ("access", &["ca", "clock", "sandbox", "store", "token"]),
    ("audit", &["clock"]),
    ("doctor", &["ca", "clock", "config", "rpc", "setup", "ssh", "store"]),
    ("config", &["audit", "ca", "events", "node", "placement", "sandbox", "url"]),
    (
        "rpc",
        &[
            "access",
            "audit",
            "config",
            "enrolment",
            "inventory",
            "node",
            "placement",
            "sandbox",
            "store",
            "token",
            "url",
        ],
    ),
    ("ssh", &["access", "audit", "rpc", "sandbox", "store"]),
    ("enrolment", &["ca", "clock", "events", "node", "sandbox", "store", "token"]),
    (
        "setup",
        &["access", "audit", "ca", "clock", "config", "enrolment", "rpc", "ssh", "store", "token"],
    ),
    ("sandbox", &["clock", "events", "inventory", "node", "placement", "store", "token"]),
    ("node", &["clock", "events", "inventory", "placement", "store"]),
    ("inventory", &["clock", "store"]),
    ("name_directory", &["node"]),
    ("events", &["clock", "store"]),
    ("placement", &[]),
    ("store", &[]),
    ("ca", &["clock"]),
    ("clock", &[]),
    ("token", &["store"]),
    ("token_command", &["clock", "store", "token"]),
    ("url", &[]),
];

/// Rules of what all daemons share.
const DAEMON: &[Rule] = &[
    ("channel", &["flow", "sever"]),
    ("audit", &[]),
    ("listen", &["peer"]),
    ("chain", &[]),
    ("clock", &[]),
    ("config", &[]),
    ("core_dumps", &[]),
    ("disk", &[]),
    ("doctor", &["peer", "systemctl", "text", "tls"]),
    ("flow", &[]),
    ("group_commit", &[]),
    ("key_files", &["replace", "text", "tls"]),
    ("keyed_count", &["sync"]),
    ("keyed_lock", &["sync"]),
    ("logs", &[]),
    ("mac", &[]),
    ("peer", &["clock"]),
    ("replace", &[]),
    ("seal", &[]),
    ("seldom", &["sync"]),
    ("sever", &[]),
    ("shares", &["sync"]),
    ("status", &[]),
    ("stop", &[]),
    ("sync", &[]),
    ("systemctl", &[]),
    ("text", &[]),
    ("tls", &["peer", "sync"]),
    ("version", &[]),
    ("web", &["tls"]),
];

/// Files that put the modules of a crate together, and its tests.
const ROOTS: &[&str] =
    &["lib", "main", "node_removal", "node_setup", "node_tunnel", "production", "tests"];

/// The module right under the crate that a file belongs to.
fn module(path: &str) -> &str {
    let inside = path.split_once("/src/").map_or(path, |(_, inside)| inside);
    inside.split_once('/').map_or(inside.trim_end_matches(".rs"), |(first, _)| first)
}

/// How many modules deep a file's module is: `rpc/mod.rs` and `saga.rs` are one deep.
fn depth(path: &str) -> usize {
    let inside = path.split_once("/src/").map_or(path, |(_, inside)| inside);
    let parts = inside.trim_end_matches(".rs").trim_end_matches("/mod");
    parts.split('/').count()
}

/// The modules of its own crate that a file names, by `crate::x`, `crate::{x, y}` or `super::x`.
fn named(file: &File) -> BTreeSet<String> {
    let code = shipped(file);
    let supers = "super::".repeat(depth(&file.path));
    let mut found = BTreeSet::new();
    for start in ["crate::", supers.as_str()] {
        for (at, _) in code.match_indices(start) {
            let deeper = code[..at].ends_with("super::") || code[..at].ends_with("::");
            if !deeper {
                found.extend(firsts(&code[at + start.len()..]));
            }
        }
    }
    found
}

/// First segments of a path, or of each path of a group in braces.
fn firsts(rest: &str) -> Vec<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    let Some(group) = rest.strip_prefix('{') else { return vec![word(rest)] };
    let (mut open, mut found, mut fresh) = (0, Vec::new(), true);
    for (at, c) in group.char_indices() {
        match c {
            '{' => open += 1,
            '}' if open == 0 => break,
            '}' => open -= 1,
            ',' if open == 0 => fresh = true,
            c if fresh && (c.is_alphanumeric() || c == '_') => {
                found.push(word(&group[at..]));
                fresh = false;
            }
            _ => {}
        }
    }
    found
}

fn check(krate: &str, rules: &[Rule]) {
    let rules: BTreeMap<_, _> = rules.iter().copied().collect();
    let files = files(&format!("{krate}/src"), &[".rs"]);
    let modules = files.iter().map(|file| module(&file.path));
    let modules: BTreeSet<_> = modules.filter(|name| !ROOTS.contains(name)).collect();
    let ruled = rules.keys().copied().collect();
    assert_eq!(modules, ruled, "each module of {krate} has a rule, and no other");
    let mut wrong = Vec::new();
    for file in &files {
        let here = module(&file.path);
        let Some(may) = rules.get(here) else { continue };
        let known = named(file);
        let known = known.iter().map(String::as_str).filter(|name| modules.contains(name));
        let banned = known.filter(|name| *name != here && !may.contains(name));
        wrong.extend(banned.map(|name| format!("{} names {name}", file.path)));
    }
    assert!(wrong.is_empty(), "imports go one way:\n{}", wrong.join("\n"));
}

#[test]
fn modules_know_only_what_is_below_them() {
    check("agent", AGENT);
    check("controller", CONTROLLER);
    check("daemon", DAEMON);
}

#[test]
fn crates_depend_only_on_lower_layers() {
    const CRATES: &[(&str, &[&str])] = &[
        ("proto", &[]),
        ("daemon", &["proto"]),
        // Its tests make archives.
        ("agent", &["proto", "daemon", "helper", "archive"]),
        ("agent/helper", &["archive", "sftp"]),
        ("sftp", &[]),
        ("archive", &[]),
        // Its tests are sandboxes themselves.
        ("controller", &["proto", "daemon", "sftp"]),
        ("cli", &["proto", "daemon", "archive"]),
    ];
    let ours = [
        "proto",
        "daemon",
        "archive",
        "agent",
        "helper",
        "sftp",
        "controller",
        "cli",
        "lab",
        "standin",
        "tests",
    ];
    for (krate, may) in CRATES {
        let manifest = read(&format!("{krate}/Cargo.toml"));
        let keys = manifest.lines().filter_map(|line| line.split(['.', '=', ' ']).next());
        for key in keys.filter(|key| ours.contains(key)) {
            assert!(may.contains(&key), "{krate} must not depend on {key}");
        }
    }
}

/// `word` stands only in files that start with one of `allowed`.
#[track_caller]
fn only_in(word: &str, dirs: &[&str], allowed: &[&str]) {
    let mut wrong = Vec::new();
    for file in dirs.iter().flat_map(|dir| files(dir, &[".rs"])) {
        let may = allowed.iter().any(|start| file.path.starts_with(start));
        if !may && names(&shipped(&file), word) {
            wrong.push(file.path);
        }
    }
    assert!(
        wrong.is_empty(),
        "{word} belongs to {allowed:?} alone, and is in:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn only_the_edge_uses_tonic() {
    only_in("tonic", &["agent/src"], &["agent/src/rpc"]);
    only_in("tonic", &["controller/src"], &["controller/src/rpc", "controller/src/node"]);
}

#[test]
fn only_run_and_sys_start_processes() {
    // A build script is no program of ours; the helper becomes its commands, it starts none.
    // Commands of an operator start units, and `sandboxctl ssh` becomes another program.
    let allowed =
        ["agent/src/run/mod.rs", "agent/src/sys/", "daemon/src/systemctl.rs", "cli/src/cmd/ssh.rs"];
    for file in ["agent/src", "controller/src", "daemon/src", "cli/src"]
        .iter()
        .flat_map(|dir| files(dir, &[".rs"]))
    {
        let code = shipped(&file);
        let starts = ["process::Command", "Command::new("].iter().any(|start| code.contains(start));
        let may = allowed.iter().any(|start| file.path.starts_with(start));
        assert!(may || !starts, "{} starts processes", file.path);
    }
}

#[test]
fn only_pve_knows_the_facts_of_pve() {
    // Paths in pmxcfs, the titles of its workers, and the program that enters containers.
    const FACTS: &[&str] = &["/etc/pve/", "/etc/pve\"", "UPID:", ".vmlist", "lxc-attach\""];
    for file in files("agent/src", &[".rs"]) {
        if file.path.starts_with("agent/src/pve/") {
            continue;
        }
        let text = shipped_with_strings(&file);
        for fact in FACTS {
            assert!(!text.contains(fact), "{} knows {fact}: ask agent/src/pve", file.path);
        }
    }
}

#[test]
fn only_sys_has_unsafe_code() {
    for file in files("", &[".rs"]) {
        let code = code(&file.text);
        let tests = file.path.starts_with("tests/") || file.path.contains("/tests/");
        let sys = ["agent/src/sys/", "agent/helper/src/sys.rs"];
        let may = sys.iter().any(|start| file.path.starts_with(start)) || tests;
        assert!(may || !names(&code, "unsafe"), "{} is unsafe", file.path);
    }
}

#[test]
fn only_the_store_and_the_journal_use_sqlite() {
    only_in("rusqlite", &["agent/src"], &["agent/src/journal"]);
    only_in("rusqlite", &["controller/src"], &["controller/src/store"]);
    only_in("rusqlite", &["daemon/src"], &["daemon/src/group_commit", "daemon/src/seal"]);
}

#[test]
fn every_form_of_an_import_is_detected() {
    let file = |path: &str, text: &str| File { path: path.into(), text: text.into() };
    let seen = |path: &str, text: &str| named(&file(path, text)).into_iter().collect::<Vec<_>>();
    let grouped = "use crate::{clock, pve::{self, Pve}, rpc};\nfn f() { crate::sys::x() }";
    assert_eq!(
        seen("agent/src/sandbox/lifecycle/create.rs", grouped),
        ["clock", "pve", "rpc", "sys"]
    );
    assert_eq!(
        seen(
            "agent/src/sandbox/lifecycle/create.rs",
            "use super::super::super::rpc; use super::x;"
        ),
        ["rpc"]
    );
    assert_eq!(seen("agent/src/sandbox/mod.rs", "use super::{rpc, pve};"), ["pve", "rpc"]);
    assert_eq!(
        seen(
            "agent/src/run/mod.rs",
            "// crate::rpc\n#[cfg(test)]\nmod tests {\n use crate::rpc;\n}"
        ),
        [""; 0]
    );
}
