//! Plain English in the comments.

use crate::source::files;

/// Words that no line of a doc comment begins with: it begins with a verb, or names its noun.
const RIDDLES: &[&str] = &["It", "What", "Who", "They", "Of", "Over", "In"];

#[test]
fn doc_comments_begin_with_a_verb_or_a_noun() {
    let mut wrong = Vec::new();
    for file in files("", &[".rs"]) {
        // Help texts of the command line are whole sentences for its users.
        if file.path.starts_with("cli/src/args") {
            continue;
        }
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
