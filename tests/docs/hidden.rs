//! Pages, messages and examples name a verb as `sandboxctl --help` lists it: `node drain`, not the short `drain`, which
//! that list leaves out. docs/sandboxctl.md has the one list of the short forms.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use clap::CommandFactory as _;

/// Files and folders with texts for people.
const PLACES: &[&str] = &[
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "SECURITY.md",
    "agent/src",
    "cli/src",
    "controller/src",
    "daemon/src",
    "docs",
    "packaging",
    "proto",
];

/// Verbs that the help of `sandboxctl` does not list.
fn hidden() -> BTreeSet<String> {
    let program = cli::args::Args::command();
    let hidden = program.get_subcommands().filter(|verb| verb.is_hide_set());
    hidden.map(|verb| verb.get_name().to_owned()).collect()
}

/// Returns the files of a place that are text, with their paths.
fn texts(place: &Path, found: &mut Vec<(PathBuf, String)>) {
    if place.is_dir() {
        for entry in fs::read_dir(place).expect("a folder") {
            texts(&entry.expect("an entry").path(), found);
        }
    } else if let Ok(text) = fs::read_to_string(place) {
        found.push((place.to_owned(), text));
    }
}

/// Finds the hidden verbs that a text names, also over the end of a line and of a comment.
fn named<'a>(text: &'a str, hidden: &BTreeSet<String>) -> Vec<&'a str> {
    let is_mark = |word: &&str| ["///", "//!", "//", "#"].contains(word);
    let words: Vec<_> = text.split_whitespace().filter(|word| !is_mark(word)).collect();
    let is_word = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
    let verbs = words.windows(2).filter_map(|pair| {
        let [program, verb] = pair else { return None };
        let program = program.trim_start_matches(|c: char| !is_word(c));
        let end = verb.find(|c: char| !is_word(c)).unwrap_or(verb.len());
        (program == "sandboxctl").then_some(&verb[..end])
    });
    verbs.filter(|verb| hidden.contains(*verb)).collect()
}

#[test]
fn no_text_names_a_verb_that_the_help_does_not_list() {
    let hidden = hidden();
    assert!(hidden.contains("nodes") && hidden.len() > 10, "{hidden:?}");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut all = Vec::new();
    for place in PLACES {
        texts(&root.join(place), &mut all);
    }
    assert!(all.len() > 500, "files are missing: {}", all.len());
    let mut wrong = Vec::new();
    for (path, text) in &all {
        let found = named(text, &hidden).into_iter();
        wrong.extend(found.map(|verb| format!("{}: sandboxctl {verb}", path.display())));
    }
    assert!(wrong.is_empty(), "write `node` or `admin` before it:\n{}", wrong.join("\n"));
}

#[test]
fn hidden_verbs_are_found_in_sentences_code_and_comments() {
    let hidden = ["nodes", "drain"].map(str::to_owned).into();
    for text in ["`sandboxctl nodes` shows", "(sandboxctl\n/// drain NODE)", "$ sandboxctl drain;"]
    {
        assert_eq!(named(text, &hidden).len(), 1, "{text}");
    }
    for text in ["`sandboxctl node drain`", "nodes of sandboxctl", "`drain`", "sandboxctl.nodes"] {
        assert_eq!(named(text, &hidden), Vec::<&str>::new(), "{text}");
    }
}
