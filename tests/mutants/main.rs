//! Shows that the suite can fail: each mutation must make the simulation fail, by the invariant
//! that it breaks, within a few seeds; without mutations the same seeds must pass. `make mutants`
//! prints the table, `make mutants ONLY=word` tries the mutants with that word in their line.

#![expect(clippy::disallowed_methods, reason = "which mutants to run is said by the environment")]

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use simulation::{Broken, Mutant, mutant, tell};

/// Number of seeds after which an undetected mutant counts as survived.
const SEEDS: u64 = 200;

/// Result of the search for a mutant.
struct Found {
    /// Number of seeds until one failed.
    red: Option<u64>,
    /// Number of seeds until the invariant that the mutant breaks was named.
    named: Option<u64>,
    /// All invariants that were named.
    by: BTreeSet<String>,
    /// One line of a failure.
    said: String,
}

fn hunt(mutant: &Mutant) -> Found {
    let mut found = Found { red: None, named: None, by: BTreeSet::new(), said: String::new() };
    for seed in 0..SEEDS {
        let Err(Broken(wrong)) = tell(seed, Some(mutant)) else { continue };
        found.red.get_or_insert(seed + 1);
        for line in &wrong {
            found.by.extend(invariants(line));
        }
        let naming = |line: &&String| invariants(line).any(|name| name == mutant.invariant);
        if let Some(line) = wrong.iter().find(naming) {
            found.named = Some(seed + 1);
            found.said.clone_from(line);
            break;
        }
    }
    found
}

/// Returns the invariants that a line names: `I` and a number.
fn invariants(line: &str) -> impl Iterator<Item = String> {
    let words = line.split(|c: char| !c.is_ascii_alphanumeric());
    let number = |word: &&str| word.strip_prefix('I').is_some_and(|n| n.parse::<u8>().is_ok());
    words.filter(number).map(str::to_owned)
}

/// Does `count` pieces of work on all cores; returns the results in their order.
fn in_parallel<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let worker = || {
        let mut mine = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                return mine;
            }
            mine.push((at, work(at)));
        }
    };
    let mut done: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("no panic gets here")).collect()
    });
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

#[test]
fn every_mutant_is_found_and_unmutated_seeds_pass() {
    daemon::logs::init("off", false);
    // A mutant may make a daemon panic: that counts as a failed seed and needs no message.
    let loud = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let only = std::env::var("PVE_SANDBOX_MUTANTS").unwrap_or_default();
    let mutants: Vec<&Mutant> = mutant::ALL
        .iter()
        .filter(|m| format!("{} {}", m.invariant, m.what).contains(&only))
        .collect();
    assert!(!mutants.is_empty(), "no mutant has {only:?} in its line");
    let lines = in_parallel(mutants.len(), |at| hunt(mutants[at]));
    std::panic::set_hook(loud);
    let mut survived = Vec::new();
    println!("{:<4} {:<66} {:>5} {:>5}  found by", "", "mutant", "red", "named");
    for (Mutant { invariant, what, .. }, found) in mutants.iter().zip(&lines) {
        let count = |seeds: Option<u64>| seeds.map_or("-".to_owned(), |seeds| seeds.to_string());
        let by = found.by.iter().cloned().collect::<Vec<_>>().join(" ");
        let (red, named) = (count(found.red), count(found.named));
        println!("{invariant:<4} {what:<66} {red:>5} {named:>5}  {by}: {}", found.said);
        if found.named.is_none() {
            survived.push(format!("{invariant}: {what}"));
        }
    }
    // A suite that always fails would find every mutant.
    let deepest = lines.iter().filter_map(|found| found.named).max().unwrap_or(SEEDS);
    let seeds: Vec<_> = (0..deepest).collect();
    for (seed, told) in seeds.iter().zip(in_parallel(seeds.len(), |at| tell(seeds[at], None))) {
        if let Err(Broken(wrong)) = told {
            survived.push(format!("seed {seed} is red without a mutant: {}", wrong.join("; ")));
        }
    }
    assert!(
        survived.is_empty(),
        "not found within {SEEDS} seeds, or red without:\n  {}",
        survived.join("\n  ")
    );
    println!("{} mutants found; {deepest} seeds without one are green", lines.len());
}
