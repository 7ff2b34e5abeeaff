//! Help texts fit a terminal of 80 columns. clap wraps the most of them; lines of usage, and examples with
//! their comments, are as somebody wrote them.

use clap::Command;

const COLUMNS: usize = 80;

/// Returns the lines of a command's help texts, and of those below it, that are wider than a terminal.
fn too_wide(command: &Command) -> Vec<String> {
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name()).to_owned();
    let mut command_itself = command.clone();
    let texts = [command_itself.render_help(), command_itself.render_long_help()];
    let texts = texts.map(|text| text.to_string());
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
fn wide_example_below_a_command_is_found() {
    let example = "x".repeat(COLUMNS + 1);
    let below = Command::new("below").after_help(example.clone());
    let mut program = Command::new("program").max_term_width(200).subcommand(below);
    program.build();
    let found = too_wide(&program);
    // In the short text and in the long one.
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found.iter().all(|line| *line == format!("program below: {example}")), "{found:?}");
}
