//! Plain English in the comments.

use crate::source::{code, files};

/// Words that no line of a doc comment begins with: it begins with a verb, or names its noun.
const RIDDLES: &[&str] = &["It", "What", "Who", "They", "Of", "Over", "In"];

/// Phrases that no native speaker would write, and what to write in their place.
const PHRASES: &[(&str, &str)] = &[
    ("an agent of before", "an older agent"),
    ("one of before", "the earlier one"),
    ("those of before", "earlier ones"),
    ("For whoever", "For those who"),
];

/// Words of an earlier dialect, as whole identifiers, and what replaced them.
const RETIRED: &[(&str, &str)] = &[
    ("called_off", "cancelled"),
    ("call_off", "cancel"),
    ("flight", "operation"),
    ("Flight", "OperationHandle"),
    ("give_back", "release, or cancel_reservation"),
    ("GiveBack", "CancelReservation"),
    ("habits", "usage_model"),
    ("hand_over", "export"),
    ("Intake", "SchedulingState"),
    ("intake", "scheduling"),
    ("Lapse", "Mutation"),
    ("Runway", "OperationTable"),
    ("Seat", "CountGuard, or Reservation"),
    ("seat", "reservation"),
    ("shunned", "avoided"),
    ("take_over", "import"),
    ("unmake", "destroy_clone"),
    ("wish", "patch, or args"),
    ("wished", "preferred"),
    ("young_cores", "booting_cores"),
];

#[test]
fn retired_words_are_not_used() {
    let mut wrong = Vec::new();
    for file in files("", &[".rs", ".proto"]) {
        // Strings may hold one: a journal keeps the words that it was written with.
        for (at, line) in code(&file.text).lines().enumerate() {
            for word in line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
                if let Some((_, now)) = RETIRED.iter().find(|(retired, _)| *retired == word) {
                    wrong.push(format!("{}:{}: {word} is {now}", file.path, at + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "use the words of docs/glossary.md:\n{}", wrong.join("\n"));
}

#[test]
fn doc_comments_begin_with_a_verb_or_a_noun() {
    let mut wrong = Vec::new();
    for file in files("", &[".rs"]) {
        for (at, line) in file.text.lines().enumerate() {
            let line = line.trim();
            let first = line.strip_prefix("/// ").and_then(|text| text.split(' ').next());
            if first.is_some_and(|first| RIDDLES.contains(&first)) {
                wrong.push(format!("{}:{}: {line}", file.path, at + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "say what it is:\n{}", wrong.join("\n"));
}

#[test]
fn phrases_of_a_dialect_are_not_used() {
    let mut wrong = Vec::new();
    for file in files("", &[".rs", ".proto", ".md"]) {
        for (at, line) in file.text.lines().enumerate() {
            for (phrase, better) in PHRASES {
                if line.contains(phrase) && file.path != "tests/tidy/language.rs" {
                    wrong.push(format!("{}:{}: {phrase}: write {better}", file.path, at + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "plain English:\n{}", wrong.join("\n"));
}
