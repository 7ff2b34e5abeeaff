//! Help texts fit a terminal of 80 columns. clap wraps nearly all of them, so that a line which is too wide comes
//! out as two. For an example that is a fault: its comment is torn. So what is written by hand, before and after
//! the options, is also looked at as it was written.

use clap::Command;

const COLUMNS: usize = 80;

/// Returns the lines of a command's help texts, and of those below it, that are wider than a terminal.
fn too_wide(command: &Command) -> Vec<String> {
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name()).to_owned();
    let mut command_itself = command.clone();
    let texts = [command_itself.render_help(), command_itself.render_long_help()];
    let texts = texts.map(|text| text.to_string());
    let written = [
        command.get_before_help(),
        command.get_before_long_help(),
        command.get_after_help(),
        command.get_after_long_help(),
    ];
    let written = written.into_iter().flatten().map(ToString::to_string);
    let texts: Vec<_> = texts.into_iter().chain(written).collect();
    let wide = texts.iter().flat_map(|text| text.lines());
    let wide = wide.filter(|line| line.chars().count() > COLUMNS);
    let mut found: Vec<_> = wide.map(|line| format!("{name}: {line}")).collect();
    found.extend(command.get_subcommands().flat_map(too_wide));
    found
}

fn count(command: &Command) -> usize {
    1 + command.get_subcommands().map(count).sum::<usize>()
}

#[test]
fn help_of_every_command_fits_80_columns() {
    let (mut seen, mut found) = (0, Vec::new());
    let with_groups = ("sandboxctl", cli::args::for_help());
    for (_, mut program) in super::programs().into_iter().chain([with_groups]) {
        program.build();
        seen += count(&program);
        found.extend(too_wide(&program));
    }
    found.dedup();
    assert!(seen > 150, "commands are missing: {seen}");
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn wide_line_that_clap_wraps_is_found() {
    let fits = format!("program {}", "x".repeat(COLUMNS - 8));
    let wide = format!("{fits} y");
    let places: [fn(Command, String) -> Command; 4] = [
        |command, text| command.before_help(text),
        |command, text| command.before_long_help(text),
        |command, text| command.after_help(text),
        |command, text| command.after_long_help(text),
    ];
    for place in places {
        let below = place(Command::new("below"), format!("Examples:\n{fits}\n{wide}"));
        let mut program = Command::new("program").term_width(COLUMNS).subcommand(below);
        program.build();
        assert_eq!(too_wide(&program), [format!("program below: {wide}")]);
    }
}

#[test]
fn wide_usage_is_found() {
    let usage = "x".repeat(COLUMNS + 1);
    let below = Command::new("below").override_usage(usage);
    let mut program = Command::new("program").term_width(COLUMNS).subcommand(below);
    program.build();
    // In the short text and in the long one.
    assert_eq!(too_wide(&program).len(), 2);
}
