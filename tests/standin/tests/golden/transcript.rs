//! Recorded transcripts: commands, their output on each stream, their exit codes.

use std::path::Path;

#[derive(Debug, Clone)]
pub(crate) struct Recorded {
    /// Line in the transcript, from 1; with the file's name it identifies the command.
    pub line: usize,
    /// Node on which the command ran, in transcripts of several nodes.
    pub node: Option<String>,
    pub text: String,
    pub out: Vec<String>,
    pub err: Vec<String>,
    /// Exit code; some parts of a longer session have none.
    pub exit: Option<i32>,
}

/// Reads all commands of a file.
pub(crate) fn read(path: &Path) -> Vec<Recorded> {
    let text = std::fs::read_to_string(path).expect("a transcript is readable");
    let mut commands: Vec<Recorded> = Vec::new();
    let mut open = false;
    for (index, line) in text.lines().enumerate() {
        if let Some((node, text)) = prompt(line) {
            commands.push(Recorded {
                line: index + 1,
                node,
                text: text.to_owned(),
                out: Vec::new(),
                err: Vec::new(),
                exit: None,
            });
            open = true;
            continue;
        }
        let Some(last) = commands.last_mut() else { continue };
        if let Some(said) = stream(line, "out|") {
            last.out.push(said);
            open = false;
        } else if let Some(said) = stream(line, "err|") {
            last.err.push(said);
            open = false;
        } else if let Some(rest) = line.strip_prefix("exit=") {
            last.exit = rest.split(' ').next().and_then(|n| n.parse().ok());
            open = false;
        } else if line.starts_with("### ") || line.starts_with("# ") || line.is_empty() {
            open = false;
        } else if open {
            // A command of several lines.
            last.text.push('\n');
            last.text.push_str(line);
        }
    }
    commands
}

fn prompt(line: &str) -> Option<(Option<String>, &str)> {
    if let Some(text) = line.strip_prefix("$ ") {
        return Some((None, text));
    }
    if line == "$" {
        return None;
    }
    let (node, text) = line.strip_prefix('[')?.split_once("]$ ")?;
    Some((Some(node.to_owned()), text))
}

fn stream(line: &str, mark: &str) -> Option<String> {
    let said = line.strip_prefix(mark)?;
    Some(said.strip_prefix(' ').unwrap_or(said).to_owned())
}
