//! What is written of the errors is what they are.

use std::collections::BTreeMap;

use proto::Reason;

use crate::source::{files, read};

/// Reason -> gRPC code.
fn in_code() -> BTreeMap<String, String> {
    let upper_snake = |camel: String| {
        let parts =
            camel.chars().flat_map(|c| c.is_uppercase().then_some('_').into_iter().chain([c]));
        parts.collect::<String>().trim_start_matches('_').to_ascii_uppercase()
    };
    let code = |reason: Reason| upper_snake(format!("{:?}", reason.code()));
    Reason::all().map(|reason| (reason.name().to_owned(), code(reason))).collect()
}

/// The same by the comments of the enum: `// CODE: meaning.` above each.
fn in_the_proto() -> BTreeMap<String, String> {
    let text = read("proto/sandbox/v1/reason.proto");
    let (_, text) = text.split_once("enum Reason {").expect("an enum");
    let (text, _) = text.split_once("\n}").expect("its end");
    let mut code = None;
    let mut found = BTreeMap::new();
    for line in text.lines().map(str::trim) {
        if let Some((first, _)) = line.strip_prefix("// ").and_then(|doc| doc.split_once(':')) {
            code.get_or_insert(first.to_owned());
        } else if let Some((name, _)) = line.split_once(" = ") {
            let code = code.take().unwrap_or_default();
            found.insert(name.trim_start_matches("REASON_").to_owned(), code);
        }
    }
    found.remove("UNSPECIFIED");
    found
}

/// The same by the table in docs/errors.md.
fn in_docs() -> BTreeMap<String, String> {
    let text = read("docs/errors.md");
    let rows = text.lines().filter(|line| line.starts_with("| ")).skip(1);
    let mut found = BTreeMap::new();
    for row in rows {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [code, reason, meaning, next] = cells.as_slice() else {
            panic!("not four cells: {row}")
        };
        assert!(!meaning.is_empty() && !next.is_empty(), "{row}");
        let before = found.insert((*reason).to_owned(), (*code).to_owned());
        assert!(before.is_none(), "{reason} is there twice");
    }
    found
}

#[test]
fn every_reason_is_documented_with_its_code_and_no_other() {
    let code = in_code();
    assert_eq!(in_docs(), code);
    assert_eq!(in_the_proto(), code);
}

/// Finds the text between two of `mark` on one line.
fn quoted(text: &str, mark: char) -> impl Iterator<Item = &str> {
    text.lines().flat_map(move |line| line.split(mark).skip(1).step_by(2))
}

#[test]
fn named_proofs_exist_and_every_mutant_is_documented() {
    let docs = read("docs/guarantees.md");
    let code: String = files("", &[".rs"]).into_iter().map(|file| file.text).collect();
    let tests: Vec<_> = quoted(&docs, '`')
        .filter(|word| {
            word.contains('_') && word.bytes().all(|b| b == b'_' || b.is_ascii_lowercase())
        })
        .collect();
    assert!(tests.len() > 50, "the file was misread");
    for test in tests {
        assert!(
            code.contains(&format!("fn {test}(")),
            "{test} is named as a proof, and is no test"
        );
    }
    let mutants = read("tests/sim/mutant.rs");
    let plain = docs.replace("**", "");
    let named: Vec<_> = quoted(&plain, '*').collect();
    let kept: Vec<_> = quoted(&mutants, '"').filter(|text| text.contains(' ')).collect();
    assert!(kept.len() > 20, "the mutants were misread");
    for mutant in &kept {
        assert!(named.contains(mutant), "the mutant {mutant:?} is not in docs/guarantees.md");
    }
    for mutant in &named {
        assert!(kept.contains(mutant), "there is no mutant {mutant:?}");
    }
}
