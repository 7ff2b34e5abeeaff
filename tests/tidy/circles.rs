//! No circles: of the modules that stand side by side, none needs another that needs it.

use std::collections::{BTreeMap, BTreeSet};

use crate::source::{File, files, shipped};

/// A module by its path under the crate: `["pve", "pct"]` for `src/pve/pct.rs` and `src/pve/pct/mod.rs`.
type Module = Vec<String>;

fn module(path: &str) -> Module {
    let inside = path.split_once("/src/").map_or(path, |(_, inside)| inside);
    let parts = inside.trim_end_matches(".rs").trim_end_matches("/mod").split('/');
    parts.map(str::to_owned).filter(|part| part != "lib" && part != "main").collect()
}

/// Every path that begins with `crate::` or `super::` in the code, as modules under the crate. A group
/// in braces is a path for each of its entries.
fn paths(file: &File, all: &BTreeSet<Module>) -> BTreeSet<Module> {
    let code = shipped(file);
    let here = module(&file.path);
    let mut found = BTreeSet::new();
    for (at, start) in code.match_indices("crate::").chain(code.match_indices("super::")) {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let base = if start == "crate::" { Module::new() } else { here.clone() };
        follow(&code[at..], base, &mut found);
    }
    found.into_iter().filter_map(|path| longest(path, all)).collect()
}

fn word(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    &text[..end]
}

/// Adds the paths that this text begins with.
fn follow(text: &str, mut base: Module, found: &mut BTreeSet<Module>) {
    let mut rest = text;
    loop {
        let name = word(rest);
        match name {
            "crate" => base.clear(),
            "super" => drop(base.pop()),
            "self" | "" => {}
            name => base.push(name.to_owned()),
        }
        rest = &rest[name.len()..];
        let Some(after) = rest.strip_prefix("::") else {
            found.insert(base);
            return;
        };
        rest = after;
        if let Some(group) = rest.strip_prefix('{') {
            for entry in entries(group) {
                follow(entry, base.clone(), found);
            }
            return;
        }
    }
}

/// The entries of a group up to its end.
fn entries(group: &str) -> Vec<&str> {
    let (mut open, mut start, mut found) = (0, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => open += 1,
            '}' if open == 0 => {
                found.push(group[start..at].trim());
                break;
            }
            '}' => open -= 1,
            ',' if open == 0 => {
                found.push(group[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    found.retain(|entry| !entry.is_empty());
    found
}

/// The module that a path leads into: what follows it names an item.
fn longest(mut path: Module, all: &BTreeSet<Module>) -> Option<Module> {
    while !path.is_empty() {
        if all.contains(&path) {
            return Some(path);
        }
        path.pop();
    }
    None
}

/// Dependencies between the modules right under each module; a module counts for all below it.
fn siblings(uses: &BTreeMap<Module, BTreeSet<Module>>) -> BTreeMap<Module, BTreeSet<Module>> {
    let mut found: BTreeMap<Module, BTreeSet<Module>> = BTreeMap::new();
    for (from, to) in uses {
        for to in to {
            let common = from.iter().zip(to).take_while(|(a, b)| a == b).count();
            if common < from.len() && common < to.len() {
                let (from, to) = (from[..=common].to_vec(), to[..=common].to_vec());
                found.entry(from).or_default().insert(to);
            }
        }
    }
    found
}

/// Lists the modules that depend on each other.
fn circles(needs: &BTreeMap<Module, BTreeSet<Module>>) -> Vec<String> {
    let reach = |from: &Module| {
        let (mut seen, mut next) = (BTreeSet::new(), vec![from.clone()]);
        while let Some(module) = next.pop() {
            for to in needs.get(&module).into_iter().flatten() {
                if seen.insert(to.clone()) {
                    next.push(to.clone());
                }
            }
        }
        seen
    };
    let reached: BTreeMap<_, _> = needs.keys().map(|module| (module, reach(module))).collect();
    let mut found = Vec::new();
    for (from, to) in needs {
        for to in
            to.iter().filter(|to| reached.get(to).is_some_and(|reached| reached.contains(from)))
        {
            found.push(format!("{} -> {}", from.join("::"), to.join("::")));
        }
    }
    found
}

fn of_crate(krate: &str) -> Vec<String> {
    let files = files(&format!("{krate}/src"), &[".rs"]);
    let all: BTreeSet<_> = files.iter().map(|file| module(&file.path)).collect();
    let tests = |file: &&File| !file.path.contains("/tests") && !file.path.contains("/fake");
    let uses = files.iter().filter(tests).map(|file| (module(&file.path), paths(file, &all)));
    circles(&siblings(&uses.collect()))
}

#[test]
fn modules_have_no_circular_dependencies() {
    let crates = ["proto", "daemon", "archive", "sftp", "agent", "controller", "cli"];
    let found: Vec<_> = crates.iter().flat_map(|krate| of_crate(krate)).collect();
    assert!(found.is_empty(), "these modules need each other:\n{}", found.join("\n"));
}

#[test]
fn circle_of_three_modules_is_detected() {
    let file = |path: &str, text: &str| File { path: path.into(), text: text.into() };
    let files = [
        file("agent/src/a/mod.rs", "use crate::b::{self, c::X};"),
        file("agent/src/b/mod.rs", "mod c;"),
        file("agent/src/b/c.rs", "use super::super::d::Y; fn f() { crate::d::g() }"),
        file("agent/src/d.rs", "use super::a::Z;"),
    ];
    let all: BTreeSet<_> = files.iter().map(|file| module(&file.path)).collect();
    let uses = files.iter().map(|file| (module(&file.path), paths(file, &all))).collect();
    assert_eq!(circles(&siblings(&uses)), ["a -> b", "b -> d", "d -> a"]);
}
