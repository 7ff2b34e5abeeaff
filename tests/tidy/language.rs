//! Plain English in the comments.

use crate::source::{code, files};

/// Words that no line of a doc comment begins with: it begins with a verb, or names its noun.
const RIDDLES: &[&str] = &["It", "What", "Who", "They", "Of", "Over", "In"];

/// Phrases that no native speaker would write, and what to write in their place.
const PHRASES: &[(&str, &str)] =
    &[("of before", "an older one, or earlier ones"), ("For whoever", "For those who")];

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
    ("hand_to", "move_config_to"),
    ("HandTo", "MoveConfig"),
    ("Intake", "SchedulingState"),
    ("intake", "scheduling"),
    ("Lapse", "Mutation"),
    ("RowHandle", "ConnectionHandle"),
    ("Runway", "OperationTable"),
    ("Seat", "CountGuard, or Reservation"),
    ("seat", "reservation"),
    ("shunned", "avoided"),
    ("Sighting", "Location"),
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

/// Finds the lines on which the phrases begin, and what to write in their place. A phrase may go on in the next line,
/// also of a comment.
fn phrases(text: &str) -> Vec<(usize, &'static (&'static str, &'static str))> {
    let (mut prose, mut starts) = (String::new(), Vec::new());
    for line in text.lines() {
        starts.push(prose.len());
        let line = line.trim();
        let marks = ["///", "//!", "//", "#"];
        prose.push_str(
            marks.iter().find_map(|mark| line.strip_prefix(*mark)).unwrap_or(line).trim(),
        );
        prose.push(' ');
    }
    let line = |at: usize| starts.partition_point(|start| *start <= at);
    let of_one = |phrase: &'static (&'static str, &'static str)| {
        prose.match_indices(phrase.0).map(|(at, _)| (line(at), phrase)).collect::<Vec<_>>()
    };
    PHRASES.iter().flat_map(of_one).collect()
}

#[test]
fn phrases_of_a_dialect_are_not_used() {
    let mut wrong = Vec::new();
    for file in files("", &[".rs", ".proto", ".md", ".sh"]) {
        if file.path != "tests/tidy/language.rs" {
            let found = phrases(&file.text).into_iter();
            wrong.extend(found.map(|(line, &(phrase, better))| {
                format!("{}:{line}: {phrase}: write {better}", file.path)
            }));
        }
    }
    assert!(wrong.is_empty(), "plain English:\n{}", wrong.join("\n"));
}

#[test]
fn phrase_is_found_also_over_the_end_of_a_line() {
    let lines = |text: &str| phrases(text).iter().map(|(line, _)| *line).collect::<Vec<_>>();
    assert_eq!(lines("fn a() {}\n    /// An agent of\n    /// before has it."), [2]);
    assert_eq!(lines("// Tokens of before.\n\nTokens\nof before.\n"), [1, 4]);
    assert_eq!(lines("/// A part of\n///\n/// before."), Vec::<usize>::new());
}
