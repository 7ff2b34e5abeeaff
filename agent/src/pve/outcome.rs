//! Result of a `pct` run that ended. Pure; tested against recorded output in `testdata/`.
//!
//! The exit code says little (2, 4 and 255 occur for the same error), so the text decides.

use super::{ErrorKind, Operation, Result};
use crate::run::Exit;

/// Characters kept of `pct`'s last line at most.
const TEXT_CHARS_MAX: usize = 500;

/// Translates the end of a command to its result. `op` is what it was to do; `None` for a command
/// of which no outcome is special.
pub fn judge(op: Option<Operation>, exit: Exit, stdout: &str, stderr: &str) -> Result<()> {
    if exit == Exit::Code(0) {
        return Ok(());
    }
    let mut text = last_line(stderr).or_else(|| last_line(stdout)).unwrap_or_else(|| match exit {
        Exit::Code(code) => format!("pct ended with exit code {code} and said nothing"),
        Exit::Signal(signal) => format!("pct was ended by signal {signal} and said nothing"),
    });
    // `pct` itself says only "startup for container 'N' failed"; LXC has said why before.
    if op == Some(Operation::Start) && text.starts_with("startup for container") {
        for line in lines_of_lxc(stdout) {
            text = format!("{text}; {line}");
        }
    }
    match (op, kind(op, stdout, stderr)) {
        // The requested state was reached before.
        (Some(Operation::Start), Some(Kind::Running))
        | (Some(Operation::Stop), Some(Kind::NotRunning))
        | (Some(Operation::Unlock), Some(Kind::NotLocked)) => Ok(()),
        (_, Some(Kind::Taken)) => Err(ErrorKind::VmidTaken(text)),
        (_, Some(Kind::Missing)) => Err(ErrorKind::NotFound(text)),
        (_, Some(Kind::Locked)) => Err(ErrorKind::Locked(text)),
        (_, Some(Kind::Full)) => Err(ErrorKind::StorageFull(text)),
        (_, Some(Kind::NoQuorum)) => Err(ErrorKind::NoQuorum(text)),
        (_, Some(Kind::Running | Kind::NotRunning | Kind::NotLocked | Kind::State)) => {
            Err(ErrorKind::WrongState(text))
        }
        (_, None) => Err(ErrorKind::Failed(text)),
    }
}

/// Finds the warning of a `pct resize` that exits with 0 although only the volume has grown, and
/// not its file system.
pub fn not_grown(stdout: &str) -> Option<String> {
    let failed = |line: &&str| line.contains("ailed to update the container's filesystem");
    let line = stdout.lines().map(str::trim).find(failed)?;
    Some(line.chars().filter(|c| !c.is_control()).take(TEXT_CHARS_MAX).collect())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Taken,
    Missing,
    Locked,
    Full,
    NoQuorum,
    Running,
    NotRunning,
    NotLocked,
    State,
}

/// Maps errors to kinds: the first row counts whose parts are all in one line of stderr.
const ROWS: &[(&[&str], Kind)] = &[
    (&["already exists on node '"], Kind::Taken),
    (&["unable to create CT", "File exists"], Kind::Taken),
    (&["Configuration file 'nodes/", "' does not exist"], Kind::Missing),
    (&["no quorum"], Kind::NoQuorum),
    (&["unable to open file '/etc/pve/", "Permission denied"], Kind::NoQuorum),
    (&["ipcc_send_rec", "failed"], Kind::NoQuorum),
    (&["CT is locked ("], Kind::Locked),
    (&["can't lock file '", "got timeout"], Kind::Locked),
    (&["cfs-lock '", "got lock request timeout"], Kind::Locked),
    (&["No space left on device"], Kind::Full),
    (&["out of space"], Kind::Full),
    (&["Disk quota exceeded"], Kind::Full),
    (&["insufficient free space"], Kind::Full),
    (&["CT ", " already running"], Kind::Running),
    (&["CT ", " not running"], Kind::NotRunning),
    (&["no lock found"], Kind::NotLocked),
    (&["you can't start a CT if it's a template"], Kind::State),
    (&["container is running"], Kind::State),
    (&["protection mode enabled"], Kind::State),
];

/// Signs of a full storage in the stdout of a worker's helpers; the second is a full btrfs.
const FULL: &[&str] = &["No space left on device", "can't read superblock on"];

fn kind(op: Option<Operation>, stdout: &str, stderr: &str) -> Option<Kind> {
    let says = |line: &str, words: &[&str]| words.iter().all(|word| line.contains(word));
    let row = ROWS.iter().find(|(words, _)| stderr.lines().any(|line| says(line, words)));
    // Checked for clones only: the stdout of other commands may contain a hook script's output.
    let full = op == Some(Operation::Clone) && FULL.iter().any(|word| stdout.contains(word));
    row.map(|(_, kind)| *kind).or_else(|| full.then_some(Kind::Full))
}

/// Bounds of the LXC lines that are kept: their number, and the length of each.
const LXC_LINES_MAX: usize = 4;
const LXC_CHARS_MAX: usize = 200;

/// Returns LXC's last lines about a failed start, made safe for a message: a tenant may control
/// parts of them.
fn lines_of_lxc(stdout: &str) -> Vec<String> {
    // Matches `function: line text`, or all of what lxc-start writes to its log.
    let of_lxc = |line: &&str| {
        let mut words = line.split(' ');
        let function = words.next().and_then(|word| word.strip_suffix(':')).unwrap_or("");
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        let number = words.next().unwrap_or("").trim_end_matches(':');
        !function.is_empty()
            && function.chars().all(is_name)
            && !number.is_empty()
            && number.chars().all(|c| c.is_ascii_digit())
    };
    let lines: Vec<&str> = stdout.lines().map(str::trim).filter(of_lxc).collect();
    let last = lines.len().saturating_sub(LXC_LINES_MAX);
    lines[last..].iter().map(|line| clean(line, LXC_CHARS_MAX)).collect()
}

/// Removes the characters that control a terminal or change the direction of text.
fn clean(line: &str, longest: usize) -> String {
    let turns = |c: char| matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
    line.chars().filter(|c| !c.is_control() && !turns(*c)).take(longest).collect()
}

/// Last line with information.
fn last_line(text: &str) -> Option<String> {
    let noise = |line: &&str| {
        line.is_empty()
            || *line == "OK"
            || line.starts_with("trying to acquire lock")
            // Usage line after a refused parameter.
            || (line.starts_with("pct ") && line.ends_with("[OPTIONS]"))
    };
    let line = text.lines().map(str::trim).rfind(|line| !noise(line))?;
    Some(clean(line, TEXT_CHARS_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(block: &str) {
        let (mut op, mut stdout, mut stderr) = (None, String::new(), String::new());
        let (mut exit, mut expected) = (Exit::Code(0), "");
        for line in block.lines() {
            if let Some(command) = line.strip_prefix("$ pct ") {
                op = command.split(' ').next().and_then(Operation::of_pct);
            } else if let Some(text) = line.strip_prefix("out| ") {
                stdout += &format!("{text}\n");
            } else if let Some(text) = line.strip_prefix("err| ") {
                stderr += &format!("{text}\n");
            } else if let Some(code) = line.strip_prefix("exit=") {
                let code: i32 = code.parse().expect("a number");
                exit = if code < 0 { Exit::Signal(-code) } else { Exit::Code(code) };
            } else if let Some(text) = line.strip_prefix("=> ") {
                expected = text;
            }
        }
        let verdict = match judge(op, exit, &stdout, &stderr) {
            Ok(()) => "Ok".to_owned(),
            Err(kind) => {
                // Debug prints `Kind("text")`; the text is split off by hand to keep its quotes.
                let debug = format!("{kind:?}");
                let name = debug.split('(').next().unwrap_or("").to_owned();
                let shown = kind.to_string();
                let text = shown.split_once(": ").filter(|_| name != "Failed");
                format!("{name}: {}", text.map_or(shown.as_str(), |(_, text)| text))
            }
        };
        assert_eq!(verdict, expected, "{block}");
    }

    #[test]
    fn recorded_outputs_are_classified() {
        let blocks = include_str!("testdata/outcomes.txt").split("\n\n");
        let blocks: Vec<_> = blocks.filter(|block| block.contains("$ pct")).collect();
        assert!(blocks.len() > 35, "{}", blocks.len());
        blocks.into_iter().for_each(check);
    }

    #[test]
    fn failed_file_system_growth_is_recognized() {
        let said = "Image resized.\nresize2fs 1.47.2 (1-Jan-2025)\n\
            The filesystem on /dev/loop3 is now 786432 (4k) blocks long.\n";
        assert_eq!(not_grown(said), None);
        let said = "Image resized.\nFailed to update the container's filesystem: command \
            'unshare -m -- sh -c ...' failed: exit code 32\n";
        assert!(not_grown(said).is_some_and(|why| why.contains("exit code 32")));
    }

    #[test]
    fn failed_start_reports_the_last_lines_of_lxc() {
        let long = format!("do_start: 7 {}\u{202e}\u{1b}[2J end", "x".repeat(900));
        let stdout = format!(
            "hook 302 pre-start\nlxc_setup: 1 one\nsync_wait: 34 two\nvm 302 - unable to parse\n\
             lxc-start: 302: ../src/lxc/start.c: lxc_spawn: 3 three\n{long}\n__lxc_start: 2119 last\n"
        );
        let fail = |op, stderr| judge(Some(op), Exit::Code(255), &stdout, stderr);
        let Err(ErrorKind::Failed(text)) =
            fail(Operation::Start, "startup for container '302' failed\n")
        else {
            panic!("it failed")
        };
        let parts: Vec<_> = text.split("; ").collect();
        assert_eq!(parts[0], "startup for container '302' failed");
        assert_eq!((parts.len(), parts[1]), (5, "sync_wait: 34 two"), "the last four: {text}");
        assert!(parts[3].starts_with("do_start: 7 x") && parts[3].chars().count() == 200);
        assert_eq!(parts[4], "__lxc_start: 2119 last");
        assert!(!text.contains(|c: char| c.is_control() || c == '\u{202e}'), "{text:?}");
        for other in ["CT is locked (backup)", "bridge 'vmbr77' does not exist"] {
            let error = fail(Operation::Start, other).expect_err("failed");
            assert!(!error.to_string().contains("two"), "{error}");
        }
        let error = fail(Operation::Stop, "startup for container '302' failed");
        let error = error.expect_err("failed");
        assert!(!error.to_string().contains("two"), "{error}");
    }

    #[test]
    fn failure_text_is_one_short_line() {
        let stderr = "\u{1b}[1m\u{7}é".repeat(1000);
        let kind = judge(Some(Operation::Set), Exit::Code(255), "", &stderr);
        let Err(ErrorKind::Failed(text)) = kind else { panic!("{kind:?}") };
        assert!(text.chars().count() == TEXT_CHARS_MAX && !text.contains('\u{7}'));
    }
}
