//! Screens of the verbs with a table, at 80 and at 120 columns, with long values.

use crate::output::{table::View, text};

/// Windows that the screens are recorded for.
const WINDOWS: [usize; 2] = [80, 120];

/// All screens for a window of this width, each under the name of its verb.
fn screens(room: usize) -> String {
    let view = View { room: Some(room), ..View::default() };
    let tables = [
        ("ls", super::ls::tests::screen()),
        ("node ls", super::nodes::tests::screen()),
        ("explain", super::explain::tests::screen()),
        ("top", super::top::tests::screen()),
        ("ps", super::ps::tests::screen()),
        ("audit ls", super::audit::tests::screen()),
        ("context ls", super::context::tests::screen()),
    ];
    let mut screens: Vec<_> = tables
        .into_iter()
        .map(|(verb, table)| (verb, table.lines(&view).expect("the usual columns").join("\n")))
        .collect();
    screens.push(("events", super::events::tests::screen("", room)));
    screens.push(("events --all-teams", super::events::tests::screen("--all-teams", room)));
    screens.iter().map(|(verb, text)| format!("=== {verb}\n{text}\n\n")).collect()
}

#[test]
fn no_row_is_wider_than_the_window() {
    for room in (20..=200).step_by(4) {
        let screens = screens(room);
        for line in screens.lines().filter(|line| !line.starts_with("===")) {
            assert!(text::width(line) <= room, "{room}: {line}");
        }
    }
}

#[test]
fn screens_are_as_recorded() {
    for room in WINDOWS {
        let name = format!("screens_at_{room}_columns");
        insta::assert_snapshot!(name, screens(room));
    }
}
