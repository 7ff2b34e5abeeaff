//! Shows that the suite can fail: each mutation must make the simulation fail, by the invariant
//! that it breaks, within a few seeds; without mutations the same seeds must pass. `make mutants`
//! prints the table, `make mutants ONLY=word` tries the mutants with that word in their line.
//!
//! seeds.txt has the seed that found each mutant last time. It is tried first, so that a run takes a
//! fraction of the time; where it finds nothing any more, the others are tried from 0. `make mutants`
//! writes the file again.

#![expect(clippy::disallowed_methods, reason = "which mutants to run is said by the environment")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use simulation::{Broken, Mutant, mutant, tell};

/// Number of seeds after which an undetected mutant counts as survived.
const SEEDS: u64 = 200;

/// Result of the search for a mutant.
struct Found {
    /// Number of seeds that were tried until one failed.
    red: Option<usize>,
    /// Number of seeds that were tried until the invariant that the mutant breaks was named, and the last.
    named: Option<(usize, u64)>,
    /// All invariants that were named.
    by: BTreeSet<String>,
    /// One line of a failure.
    said: String,
}

fn hunt(mutant: &Mutant, first: Option<u64>) -> Found {
    let mut found = Found { red: None, named: None, by: BTreeSet::new(), said: String::new() };
    let others = (0..SEEDS).filter(|seed| Some(*seed) != first);
    for (number, seed) in first.into_iter().chain(others).enumerate() {
        let Err(Broken(wrong)) = tell(seed, Some(mutant)) else { continue };
        found.red.get_or_insert(number + 1);
        for line in &wrong {
            found.by.extend(invariants(line));
        }
        let naming = |line: &&String| invariants(line).any(|name| name == mutant.invariant);
        if let Some(line) = wrong.iter().find(naming) {
            found.named = Some((number + 1, seed));
            found.said.clone_from(line);
            break;
        }
    }
    found
}

fn seeds_file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("mutants/seeds.txt")
}

/// Name of a mutant in the file.
fn name(mutant: &Mutant) -> String {
    format!("{} {}", mutant.invariant, mutant.what)
}

/// Reads the seed of each mutant: a line has the seed and the mutant's name.
fn known_seeds() -> BTreeMap<String, u64> {
    let text = fs::read_to_string(seeds_file()).unwrap_or_default();
    let lines = text.lines().filter_map(|line| {
        let (seed, name) = line.trim().split_once(' ')?;
        Some((name.to_owned(), seed.parse().ok().filter(|seed| *seed < SEEDS)?))
    });
    lines.collect()
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
    let mutants: Vec<&Mutant> = mutant::ALL.iter().filter(|m| name(m).contains(&only)).collect();
    assert!(!mutants.is_empty(), "no mutant has {only:?} in its line");
    let known = known_seeds();
    let first = |mutant: &Mutant| known.get(&name(mutant)).copied();
    let lines = in_parallel(mutants.len(), |at| hunt(mutants[at], first(mutants[at])));
    std::panic::set_hook(loud);
    let mut survived = Vec::new();
    println!("{:<4} {:<66} {:>5} {:>5} {:>5}  found by", "", "mutant", "red", "named", "seed");
    for (Mutant { invariant, what, .. }, found) in mutants.iter().zip(&lines) {
        let count = |number: Option<String>| number.unwrap_or_else(|| "-".to_owned());
        let by = found.by.iter().cloned().collect::<Vec<_>>().join(" ");
        let red = count(found.red.map(|tried| tried.to_string()));
        let named = count(found.named.map(|(tried, _)| tried.to_string()));
        let seed = count(found.named.map(|(_, seed)| seed.to_string()));
        println!("{invariant:<4} {what:<66} {red:>5} {named:>5} {seed:>5}  {by}: {}", found.said);
        if found.named.is_none() {
            survived.push(format!("{invariant}: {what}"));
        }
    }
    // A suite that always fails would find every mutant.
    let seeds: BTreeSet<_> = lines.iter().filter_map(|found| Some(found.named?.1)).collect();
    let seeds: Vec<_> = seeds.into_iter().collect();
    for (seed, told) in seeds.iter().zip(in_parallel(seeds.len(), |at| tell(seeds[at], None))) {
        if let Err(Broken(wrong)) = told {
            survived.push(format!("seed {seed} is red without a mutant: {}", wrong.join("; ")));
        }
    }
    if only.is_empty() && std::env::var_os("PVE_SANDBOX_MUTANTS_WRITE").is_some() {
        let named = mutants.iter().zip(&lines);
        let line = |(mutant, found): (&&Mutant, &Found)| {
            Some(format!("{} {}\n", found.named?.1, name(mutant)))
        };
        let text: String = named.filter_map(line).collect();
        fs::write(seeds_file(), text).expect("written");
    }
    assert!(
        survived.is_empty(),
        "not found within {SEEDS} seeds, or red without:\n  {}",
        survived.join("\n  ")
    );
    println!("{} mutants found; {} seeds without one are green", lines.len(), seeds.len());
}
