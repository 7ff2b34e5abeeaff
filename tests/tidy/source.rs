//! Files of the repository, and Rust code without what is not code.

use std::path::{Path, PathBuf};

/// Made by tools, or not ours.
const SKIPPED: &[&str] = &["target", ".git", "node_modules", "gen"];

/// Top of the repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests is a folder of it").to_owned()
}

/// A file by its path from the top.
#[track_caller]
pub(crate) fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A file with its path from the top.
pub(crate) struct File {
    pub(crate) path: String,
    pub(crate) text: String,
}

/// All text files under `dir` whose names end like one of `endings`; all if there is none.
pub(crate) fn files(dir: &str, endings: &[&str]) -> Vec<File> {
    let mut found = Vec::new();
    let mut open = vec![root().join(dir)];
    while let Some(dir) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        for entry in entries {
            let entry = entry.expect("readable");
            let (name, path) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
            let kind = entry.file_type().expect("has a type");
            if SKIPPED.contains(&name.as_str()) {
                continue;
            }
            if kind.is_dir() {
                open.push(path);
            } else if kind.is_file()
                && (endings.is_empty() || endings.iter().any(|end| name.ends_with(end)))
            {
                // What is not UTF-8 is data.
                let Ok(text) = std::fs::read_to_string(&path) else { continue };
                let path = path.strip_prefix(root()).expect("under the top");
                found.push(File { path: path.to_string_lossy().into_owned(), text });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// Rust code as it ships: comments, strings and what is compiled for tests only are blanked.
pub(crate) fn shipped(file: &File) -> String {
    without_tests(file, code)
}

/// Rust code as it ships, with its strings.
pub(crate) fn shipped_with_strings(file: &File) -> String {
    without_tests(file, |text| blank(text, false))
}

fn without_tests(file: &File, code: fn(&str) -> String) -> String {
    let of_tests = ["/tests.rs", "_suite.rs"].iter().any(|end| file.path.ends_with(end));
    if of_tests || file.path.contains("/tests/") {
        return String::new();
    }
    let code = code(&file.text);
    match code.find("#[cfg(test)]\nmod ") {
        // A module of tests ends its file; `mod tests;` is one line of many.
        Some(start) if code[start..].lines().nth(1).is_some_and(|line| line.ends_with('{')) => {
            code[..start].to_owned()
        }
        _ => code,
    }
}

/// Rust code without comments and strings. Good enough for searching, no lexer.
pub(crate) fn code(text: &str) -> String {
    blank(text, true)
}

/// Blanks comments, and strings where `strings` says so.
fn blank(text: &str, strings: bool) -> String {
    let mut out = String::with_capacity(text.len());
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &text[at..];
        let end = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(end) = raw_string(rest, at.checked_sub(1).map(|before| bytes[before])) {
            end
        } else if rest.starts_with('"') {
            quoted(rest)
        } else if rest.starts_with("'\"'") || rest.starts_with("'\\\"'") {
            rest[1..].find('\'').map_or(1, |end| end + 2)
        } else {
            let width = rest.chars().next().map_or(1, char::len_utf8);
            out.push_str(&rest[..width]);
            at += width;
            continue;
        };
        if !strings && !rest.starts_with('/') {
            out.push_str(&rest[..end]);
            at += end;
            continue;
        }
        // Lines stay lines.
        out.extend(rest[..end].chars().filter(|&c| c == '\n'));
        at += end;
    }
    out
}

fn raw_string(rest: &str, before: Option<u8>) -> Option<usize> {
    if before.is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return None;
    }
    let tail = rest.strip_prefix("br").or_else(|| rest.strip_prefix('r'))?;
    let hashes = tail.len() - tail.trim_start_matches('#').len();
    let body = tail[hashes..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(hashes));
    let end = body.find(&close).map_or(body.len(), |end| end + close.len());
    Some(rest.len() - body.len() + end)
}

fn quoted(rest: &str) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Whether `word` stands in `code` as a whole identifier.
pub(crate) fn names(code: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word)
        .any(|(at, _)| !code[..at].ends_with(part) && !code[at + word.len()..].starts_with(part))
}

#[test]
fn strings_and_comments_are_not_code() {
    let text = "let a = \"unsafe \\\" x\"; // unsafe\nlet b = r#\"unsafe\"#; /* unsafe\n*/ let c = '\"'; d(b\"unsafe\");\n";
    let code = code(text);
    assert!(!names(&code, "unsafe"), "{code}");
    assert!(names(&code, "c") && code.lines().count() == 3, "{code}");
    assert!(names("unsafe { x }", "unsafe") && !names("unsafe_code", "unsafe"));
    let file = File { path: "x.rs".into(), text: text.into() };
    let kept =
        "let a = \"unsafe \\\" x\"; \nlet b = r#\"unsafe\"#; \n let c = '\"'; d(b\"unsafe\");\n";
    assert_eq!(shipped_with_strings(&file), kept);
}
