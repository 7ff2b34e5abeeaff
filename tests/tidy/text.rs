//! Length, leftovers, and words that do not belong in a repository.

use crate::source::{code, files};

const LINES_MAX: usize = 700;

#[test]
fn files_are_short() {
    let endings = [".rs", ".proto", ".mjs", ".sh", ".py"];
    for file in files("", &endings) {
        let lines = file.text.lines().count();
        assert!(lines <= LINES_MAX, "{} has {lines} lines; split it", file.path);
    }
}

#[test]
fn no_test_is_ignored_and_no_code_is_unfinished() {
    // In pieces, so that this file may be looked at too.
    let banned = [concat!("#[ign", "ore"), concat!("todo", "!("), concat!("unimplemen", "ted!(")];
    for file in files("", &[".rs"]) {
        let code = code(&file.text);
        for word in banned {
            assert!(!code.contains(word), "{}: {word}", file.path);
        }
    }
}

#[test]
fn repository_names_no_private_paths_or_registries() {
    // Paths of somebody's checkout or home, and hosts of somebody's registry.
    let banned = [
        concat!("/wo", "rk/"),
        concat!("/ho", "me/"),
        concat!("/Us", "ers/"),
        concat!("registry.", "npmjs"),
        concat!("index.", "crates.io"),
    ];
    for file in files("", &[]) {
        // Recorded from a real host, word for word.
        if file.path.contains("/testdata/") {
            continue;
        }
        for word in banned {
            let line = file.text.lines().position(|line| line.contains(word)).map(|at| at + 1);
            assert!(line.is_none(), "{}:{}: {word}", file.path, line.unwrap_or(0));
        }
    }
}

#[test]
fn every_rust_file_starts_with_a_doc_comment() {
    let crates = ["proto", "daemon", "agent", "controller", "cli"];
    for file in crates.iter().flat_map(|krate| files(&format!("{krate}/src"), &[".rs"])) {
        // What is for tests only is said by the file that it tests.
        if file.path.ends_with("/tests.rs") || file.path.contains("/tests/") {
            continue;
        }
        let first = file.text.lines().next().unwrap_or("");
        assert!(
            first.starts_with("//!"),
            "{} does not start with a sentence on what it is",
            file.path
        );
    }
}
