//! Public items and fields say what they are.

use crate::source::files;

/// Words that begin an item or a field after `pub`.
const ITEMS: &[&str] =
    &["async", "const", "enum", "fn", "static", "struct", "trait", "type", "unsafe"];

/// Whether a line begins a public item or field. One whose name is a macro's is documented where the macro is used.
fn is_public(line: &str) -> bool {
    let Some(rest) = line.strip_prefix("pub ") else { return false };
    let word = rest.split(' ').next().unwrap_or_default();
    (ITEMS.contains(&word) || word.ends_with(':')) && !rest.contains('$')
}

/// Finds the public items and fields of a file that have no doc comment.
fn bare(text: &str) -> Vec<(usize, &str)> {
    let (mut found, mut is_documented, mut open) = (Vec::new(), false, 0_usize);
    for (at, line) in text.lines().enumerate() {
        // A module of tests ends its file.
        if line == "#[cfg(test)]"
            && text.lines().nth(at + 1).is_some_and(|next| next.ends_with('{'))
        {
            break;
        }
        let line = line.trim();
        if open > 0 || line.starts_with("#[") {
            // An attribute between the comment and the item.
            open += line.matches('[').count();
            open = open.saturating_sub(line.matches(']').count());
        } else if line.starts_with("///") {
            is_documented = true;
        } else {
            if is_public(line) && !is_documented {
                found.push((at + 1, line));
            }
            is_documented = false;
        }
    }
    found
}

#[test]
fn public_items_and_fields_have_doc_comments() {
    let mut wrong = Vec::new();
    for krate in ["proto", "daemon", "archive", "sftp", "agent", "controller", "cli"] {
        for file in files(&format!("{krate}/src"), &[".rs"]) {
            let of_tests = ["/tests", "/fake", "_suite.rs", "conformance"];
            if !of_tests.iter().any(|part| file.path.contains(part)) {
                let bare = bare(&file.text).into_iter();
                wrong.extend(bare.map(|(line, item)| format!("{}:{line}: {item}", file.path)));
            }
        }
    }
    assert!(wrong.is_empty(), "say what these are:\n{}", wrong.join("\n"));
}

#[test]
fn item_without_a_doc_comment_is_found() {
    let text = "/// Said.\n#[arg(\n    long,\n)]\npub struct A {\n    pub a: u32,\n    /// Said.\n    #[arg(short)]\n    \
                pub b: u32,\n}\npub(crate) fn c() {}\npub fn d() {}\n#[cfg(test)]\nmod tests {\n    pub fn e() {}\n}\n";
    assert_eq!(bare(text), [(6, "pub a: u32,"), (12, "pub fn d() {}")]);
}
