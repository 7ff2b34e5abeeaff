//! Form of a report for people. Pure.

use super::{Check, ROOM, Report, State};

/// Columns of the verdict, and the gap behind it.
const VERDICT: usize = 9;
/// Columns of the name at most, and the gap behind it.
const NAME: usize = 21;

pub(super) fn text(report: &Report) -> String {
    let longest = report.checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
    let name = (longest + 2).min(NAME);
    let mut lines = Vec::new();
    for check in &report.checks {
        lines.extend(of_one(check, name));
    }
    lines.push(summary(report));
    lines.join("\n")
}

fn of_one(check: &Check, name: usize) -> Vec<String> {
    let indent = VERDICT + name;
    let what = match check.subject.as_str() {
        "" => check.found.clone(),
        subject => format!("{subject}: {}", check.found),
    };
    let mut lines = fold(&what, ROOM - indent);
    if let Some(first) = lines.first_mut() {
        *first = format!("{:VERDICT$}{:name$}{first}", check.state.name(), check.name);
    }
    for line in lines.iter_mut().skip(1) {
        *line = format!("{:indent$}{line}", "");
    }
    // From the left margin on: commands are long, and people copy them.
    let remedy =
        check.remedy.iter().flat_map(|remedy| fold(&format!("remedy: {remedy}"), ROOM - 2));
    lines.extend(remedy.map(|line| format!("  {line}")));
    lines
}

fn summary(report: &Report) -> String {
    let all = report.checks.len();
    match (report.count(State::Failed), report.count(State::Warning)) {
        (0, 0) => format!("{all} checks: nothing is wrong"),
        (failed, warnings) => format!("{all} checks: {failed} failed, {warnings} warnings"),
    }
}

/// Breaks a text into lines, between words where that is possible. Control characters become blanks.
fn fold(text: &str, room: usize) -> Vec<String> {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut lines = Vec::new();
    let (mut line, mut used) = (String::new(), 0);
    for word in text.split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        if used > 0 && used + 1 + word.len() > room {
            lines.push(std::mem::take(&mut line));
            used = 0;
        }
        while word.len() > room {
            lines.push(word.drain(..room).collect());
        }
        if used > 0 {
            line.push(' ');
            used += 1;
        }
        used += word.len();
        line.extend(word);
    }
    if used > 0 || lines.is_empty() {
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_for_people_fits_eighty_columns_and_obeys_nobody() {
        let long = "/very/long/path".repeat(9);
        let report = Report::new(vec![
            Check::ok("clock", "", "it is synchronised"),
            Check::warning("name-server", "10.0.0.1", "no\u{1b}[2Janswer\nat all", "systemctl x"),
            Check::failed("certificate", long.clone(), "it has ended", format!("chmod 600 {long}")),
        ]);
        let text = report.text();
        assert!(text.lines().all(|line| line.chars().count() <= ROOM), "{text}");
        assert!(!text.contains('\u{1b}'), "{text:?}");
        let first: Vec<_> = text.lines().take(3).collect();
        assert_eq!(
            first,
            [
                "ok       clock        it is synchronised",
                "warning  name-server  10.0.0.1: no [2Janswer at all",
                "  remedy: systemctl x",
            ]
        );
        assert!(text.ends_with("3 checks: 1 failed, 1 warnings"), "{text}");
    }
}
