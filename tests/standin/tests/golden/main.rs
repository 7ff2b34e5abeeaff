//! Replays the recorded transcripts of the real `pct` against the stand-in.
//!
//! Every command of every transcript is either replayed or listed with a reason in
//! `NOT_MODELLED.md`. Commands that need running containers are replayed only with `STANDIN_LXC=1`,
//! inside a node of the lab, with `STANDIN_POOL` (a directory on btrfs) and `STANDIN_ROOTFS` (a
//! subvolume with a root file system).

#![expect(
    clippy::disallowed_methods,
    reason = "a test starts the program that it tests, waits and reads its environment"
)]

mod cluster;
mod normal;
mod plan;
mod rules;
mod transcript;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cluster::{Cluster, RealLxc, Said};
use plan::Plan;
use transcript::Recorded;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata")
}

/// Parses `- `FILE:LINE`` or `- `FILE`` at the beginning of a line of the list.
fn not_modelled() -> BTreeMap<String, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("NOT_MODELLED.md");
    let text = std::fs::read_to_string(path).expect("the list is readable");
    let (_, list) = text.split_once("## Recorded commands").expect("the list has its heading");
    let entries = list.lines().filter_map(|line| line.strip_prefix("- `")?.split_once('`'));
    entries
        .flat_map(|(names, reason)| {
            let (file, lines) = names.split_once(':').unwrap_or((names, ""));
            let reason = reason.trim_start_matches(':').trim();
            assert!(!reason.is_empty(), "{names} has no reason");
            let lines: Vec<&str> = lines.split(',').collect();
            lines
                .into_iter()
                .map(|line| match line.trim() {
                    "" => (file.to_owned(), reason.to_owned()),
                    line => (format!("{file}:{line}"), reason.to_owned()),
                })
                .collect::<Vec<_>>()
        })
        .collect()
}

fn transcripts() -> Vec<String> {
    let entries = std::fs::read_dir(data().join("transcripts")).expect("transcripts");
    let mut names: Vec<String> =
        entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn recorded(name: &str) -> Vec<Recorded> {
    transcript::read(&data().join("transcripts").join(name))
}

#[test]
fn every_command_is_replayed_or_listed() {
    let listed = not_modelled();
    let mut known: Vec<String> = Vec::new();
    for name in transcripts() {
        known.push(name.clone());
        let plan = plan::read(&data().join("replay").join(&name));
        for command in recorded(&name) {
            let id = format!("{name}:{}", command.line);
            let replayed = plan.is_some() && !listed.contains_key(&id);
            let excused = listed.contains_key(&name) || listed.contains_key(&id);
            assert!(replayed || excused, "{id} is neither replayed nor listed: {}", command.text);
            known.push(id);
        }
    }
    for id in listed.keys() {
        assert!(known.contains(id), "the list names {id}, which is no recorded command");
    }
}

fn replay(name: &str) {
    let plan = plan::read(&data().join("replay").join(name)).expect("a plan");
    let real = RealLxc::from_env();
    let listed = not_modelled();
    let cluster = Cluster::new(real.clone());
    if !plan.fixture.is_empty() {
        let said = cluster.run(&plan.fixture, "pve1");
        assert!(said.exit == Some(0), "the fixture of {name} failed: {said:?}");
    }
    let mut wrong = Vec::new();
    let mut skipped = 0;
    for command in recorded(name) {
        if listed.contains_key(&format!("{name}:{}", command.line)) {
            continue;
        }
        if real.is_none() && plan.needs_lxc.contains(&command.line) {
            skipped += 1;
            continue;
        }
        if let Some(difference) = step(&cluster, &plan, &command) {
            wrong.push(format!("--- {name}:{} $ {}\n{difference}", command.line, command.text));
        }
    }
    if skipped > 0 {
        println!("{name}: skipped {skipped} commands that need STANDIN_LXC=1 inside a lab node");
    }
    assert!(wrong.is_empty(), "{} differ\n{}", wrong.len(), wrong.join("\n"));
}

/// Replays one command; returns the difference, if there is one.
fn step(cluster: &Cluster, plan: &Plan, command: &Recorded) -> Option<String> {
    let line = command.line;
    let node = command.node.as_deref().unwrap_or("pve1");
    for shell in plan.before.get(&line).into_iter().flatten() {
        match shell.as_str() {
            "quorum 0" => cluster.set_quorum(false),
            "quorum 1" => cluster.set_quorum(true),
            shell => {
                let said = cluster.run(shell, node);
                assert!(said.exit == Some(0), "before {line}: {shell}: {said:?}");
            }
        }
    }
    if let Some(json) = plan.faults.get(&line) {
        let rules: Vec<standin::faults::Rule> = serde_json::from_str(json).expect("a fault plan");
        standin::faults::write_plan(cluster.control_dir(), &rules).expect("a fault plan");
    }
    let said = cluster.run(&plan.edited(line, &command.text), node);
    let told = form(cluster, plan, line, &said);
    let expected = Said { out: command.out.clone(), err: command.err.clone(), exit: command.exit };
    let wanted = form(cluster, plan, line, &expected);
    let exit_fits = command.exit.is_none() || command.exit == said.exit;
    if told == wanted && exit_fits {
        return None;
    }
    if let Some((a, b)) = plan.either.get(&line) {
        let swap = |text: &String| text.replace(a, "\u{1}").replace(b, a).replace('\u{1}', b);
        let mut swapped: Vec<String> = told.iter().map(swap).collect();
        swapped.sort();
        if swapped == wanted && exit_fits {
            return None;
        }
    }
    let show = |lines: &[String]| lines.iter().map(|l| format!("    {l}\n")).collect::<String>();
    Some(format!(
        "  recorded (exit {:?}):\n{}  here (exit {:?}):\n{}",
        command.exit,
        show(&wanted),
        said.exit,
        show(&told)
    ))
}

fn form(cluster: &Cluster, plan: &Plan, line: usize, said: &Said) -> Vec<String> {
    let streams = [("out", &said.out), ("err", &said.err)];
    let mut lines: Vec<String> = streams
        .iter()
        .flat_map(|(stream, lines)| lines.iter().map(move |l| format!("{stream}| {l}")))
        .filter(|text| plan.counts(line, text))
        .map(|text| normal::line(&text, &cluster.dir))
        .collect();
    if plan.unordered.contains(&line) || plan.either.contains_key(&line) {
        lines.sort();
    }
    lines
}

macro_rules! replayed {
    ($($test:ident: $file:literal;)*) => {
        $(#[test] fn $test() { replay(concat!($file, ".txt")); })*

        #[test]
        fn every_plan_has_a_test() {
            let tested = [$(concat!($file, ".txt")),*];
            for entry in std::fs::read_dir(data().join("replay")).expect("plans").flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                assert!(tested.contains(&name.as_str()), "{name} is not replayed by a test");
            }
        }
    };
}

replayed! {
    list_status_config: "01-list-status-config";
    start_failures: "02-start-failures";
    exec: "03-exec";
    stop_shutdown_destroy: "04-stop-shutdown-destroy";
    locks_concurrency: "05-locks-concurrency";
    locks_concurrency_2: "05b-locks-concurrency-2";
    killed_pct: "06-killed-pct";
    config_format: "07-config-format";
    config_pending_snapshots: "07b-config-pending-snapshots";
    storage_full: "08-storage-full";
    cluster: "10-cluster";
    fastpaths: "11-fastpaths";
    frozen: "11b-frozen";
    frozen_hang: "11c-frozen-hang";
    environment: "12-environment";
    stale_lxc_config: "13-stale-lxc-config";
    clone_description: "14-clone-description";
}
