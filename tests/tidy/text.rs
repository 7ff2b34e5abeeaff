//! Length, leftovers, and words that do not belong in a repository.

use crate::source::{code, files, shipped_with_strings};

const LINES_MAX: usize = 700;
/// Gap in a line of text that is no alignment: a text over two lines of code whose `\` is lost.
const GAP: &str = "        ";

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

/// Whether a text of this line of code has a gap in it.
fn has_gap(line: &str) -> bool {
    line.split_once('"').is_some_and(|(_, text)| text.trim().contains(GAP))
}

#[test]
fn texts_have_no_gaps() {
    let mut wrong = Vec::new();
    for krate in ["proto", "daemon", "archive", "sftp", "agent", "controller", "cli"] {
        for file in files(&format!("{krate}/src"), &[".rs"]) {
            let shipped = shipped_with_strings(&file);
            let gaps = shipped.lines().filter(|line| has_gap(line));
            wrong.extend(gaps.map(|line| format!("{}: {}", file.path, line.trim())));
        }
    }
    assert!(wrong.is_empty(), "end the line of code with a backslash:\n{}", wrong.join("\n"));
}

#[test]
fn gap_in_a_text_is_found() {
    assert!(has_gap(r#"    let what = "it stays            until then";"#));
    for good in [r#"    let a = "x";            "#, r#"            "deep", "#, "let a        = 1;"]
    {
        assert!(!has_gap(good), "{good}");
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
