//! Who may know whom: edge -> domain -> host, one direction.

use std::collections::{BTreeMap, BTreeSet};

use crate::source::{File, code, files, names, read, shipped};

/// For each module of the agent, the modules that it must not name.
///
/// rpc, ingress, reconcile -> sandbox -> {shim, pve, journal, saga, sys} -> run.
const AGENT: &[(&str, &[&str])] = &[
    ("rpc", &["ingress", "reconcile"]),
    ("ingress", &["rpc", "reconcile"]),
    ("reconcile", &["rpc", "ingress"]),
    ("sandbox", &["rpc", "ingress", "reconcile"]),
    ("shim", &["rpc", "ingress", "reconcile", "sandbox", "journal", "saga"]),
    ("pve", &["rpc", "ingress", "reconcile", "sandbox", "shim", "journal", "saga"]),
    ("journal", &["rpc", "ingress", "reconcile", "sandbox", "saga", "sys", "run"]),
    ("saga", &["rpc", "ingress", "reconcile", "sandbox", "pve", "journal", "sys", "run"]),
    ("dhcp", &["rpc", "ingress", "reconcile", "journal", "saga", "pve", "shim"]),
    ("load", &["rpc", "ingress", "reconcile", "sandbox", "saga"]),
    ("run", &["rpc", "ingress", "reconcile", "sandbox", "shim", "pve", "journal", "saga"]),
    ("sys", &["rpc", "ingress", "reconcile", "sandbox", "shim", "pve", "journal", "saga", "run"]),
];

/// The same for the controller: what is pure knows nobody, the store knows nobody, the nodes'
/// client does not know who asks.
const CONTROLLER: &[(&str, &[&str])] = &[
    ("placement", &["rpc", "sandbox", "node", "store", "reconcile", "ca"]),
    ("store", &["rpc", "sandbox", "node", "events", "placement", "reconcile"]),
    ("events", &["rpc", "sandbox", "node", "placement", "reconcile", "ca"]),
    ("node", &["rpc", "sandbox", "reconcile"]),
    ("sandbox", &["rpc", "reconcile"]),
    ("reconcile", &["rpc"]),
    ("ca", &["rpc", "sandbox", "node", "placement", "reconcile"]),
];

/// The module right under the crate that a file belongs to.
fn module(path: &str) -> &str {
    let inside = path.split_once("/src/").map_or(path, |(_, inside)| inside);
    inside.split_once('/').map_or(inside.trim_end_matches(".rs"), |(first, _)| first)
}

/// How many modules deep a file's module is: `rpc/mod.rs` and `run.rs` are one deep.
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

fn check(krate: &str, rules: &[(&str, &[&str])]) {
    let rules: BTreeMap<_, _> = rules.iter().copied().collect();
    let mut wrong = Vec::new();
    for file in files(&format!("{krate}/src"), &[".rs"]) {
        let Some(banned) = rules.get(module(&file.path)) else { continue };
        let named = named(&file);
        for module in banned.iter().filter(|module| named.contains(**module)) {
            wrong.push(format!("{} names {module}", file.path));
        }
    }
    assert!(wrong.is_empty(), "imports go one way:\n{}", wrong.join("\n"));
}

#[test]
fn the_agents_modules_know_only_what_is_below_them() {
    check("agent", AGENT);
}

#[test]
fn the_controllers_modules_know_only_what_is_below_them() {
    check("controller", CONTROLLER);
}

#[test]
fn crates_know_only_what_is_below_them() {
    const CRATES: &[(&str, &[&str])] = &[
        ("proto", &[]),
        ("daemon", &["proto"]),
        ("agent", &["proto", "daemon", "helper"]),
        ("agent/helper", &[]),
        ("controller", &["proto", "daemon"]),
        ("cli", &["proto", "daemon"]),
    ];
    let ours =
        ["proto", "daemon", "agent", "helper", "controller", "cli", "lab", "standin", "tests"];
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
fn only_the_edge_knows_tonic() {
    only_in("tonic", &["agent/src"], &["agent/src/rpc"]);
    only_in("tonic", &["controller/src"], &["controller/src/rpc", "controller/src/node"]);
}

#[test]
fn only_one_file_starts_processes() {
    // A build script is no program of ours; the helper becomes its commands, it starts none.
    let allowed = ["agent/src/run.rs", "agent/src/sys/"];
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
fn only_sys_is_unsafe() {
    for file in files("", &[".rs"]) {
        let code = code(&file.text);
        let tests = file.path.starts_with("tests/") || file.path.contains("/tests/");
        let sys = ["agent/src/sys/", "agent/helper/src/sys.rs"];
        let may = sys.iter().any(|start| file.path.starts_with(start)) || tests;
        assert!(may || !names(&code, "unsafe"), "{} is unsafe", file.path);
    }
}

#[test]
fn only_the_store_and_the_journal_know_sql() {
    only_in("rusqlite", &["agent/src"], &["agent/src/journal"]);
    only_in("rusqlite", &["controller/src"], &["controller/src/store"]);
}

#[test]
fn the_check_sees_every_form_of_an_import() {
    let file = |path: &str, text: &str| File { path: path.into(), text: text.into() };
    let seen = |path: &str, text: &str| named(&file(path, text)).into_iter().collect::<Vec<_>>();
    let grouped = "use crate::{clock, pve::{self, Pve}, rpc};\nfn f() { crate::sys::x() }";
    assert_eq!(seen("agent/src/sandbox/create.rs", grouped), ["clock", "pve", "rpc", "sys"]);
    assert_eq!(
        seen("agent/src/sandbox/create.rs", "use super::super::rpc; use super::x;"),
        ["rpc"]
    );
    assert_eq!(seen("agent/src/sandbox/mod.rs", "use super::{rpc, pve};"), ["pve", "rpc"]);
    assert_eq!(
        seen("agent/src/run.rs", "// crate::rpc\n#[cfg(test)]\nmod tests {\n use crate::rpc;\n}"),
        [""; 0]
    );
}
