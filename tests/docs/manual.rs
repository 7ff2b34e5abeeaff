//! The manual pages of the daemons are written by hand: each command has an entry in the synopsis, and each of its
//! flags stands there or among the options. (Those of `sandboxctl` are made from its help texts.)

use std::{collections::BTreeSet, path::Path};

use clap::Command;

/// Page of a daemon as plain text.
fn page(program: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/man");
    let text = std::fs::read_to_string(path.join(format!("{program}.8"))).expect(program);
    text.replace("\\-", "-")
}

/// Lines of a section.
fn section<'a>(page: &'a str, heading: &str) -> Vec<&'a str> {
    let start = format!(".SH {heading}");
    let lines = page.lines().skip_while(|line| *line != start).skip(1);
    lines.take_while(|line| !line.starts_with(".SH ")).collect()
}

/// Words of these lines, without the fonts that they are set in.
fn words(lines: &[&str]) -> String {
    let without_font = |line: &&str| match line.split_once(' ') {
        Some((font, rest)) if font.starts_with('.') => rest.to_owned(),
        Some(_) | None => (*line).to_owned(),
    };
    let text: Vec<_> = lines.iter().map(without_font).collect();
    format!("{} ", text.join(" "))
}

/// Flags that a text names.
fn flags(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    words.filter_map(|word| word.strip_prefix("--")).collect()
}

/// Says what of a command, and of those below it, a page leaves out.
fn missing(command: &Command, page: &str) -> Vec<String> {
    let below = command.get_subcommands();
    let below: Vec<_> =
        below.filter(|verb| !verb.is_hide_set() && verb.get_name() != "help").collect();
    if !below.is_empty() {
        return below.into_iter().flat_map(|verb| missing(verb, page)).collect();
    }
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
    let (synopsis, options) = (section(page, "SYNOPSIS"), words(&section(page, "OPTIONS")));
    let entries = synopsis.split(|line| *line == ".br").map(words);
    let Some(entry) = entries.into_iter().find(|entry| entry.contains(&format!("{name} "))) else {
        return vec![name.to_owned()];
    };
    let told: BTreeSet<_> = flags(&entry).union(&flags(&options)).copied().collect();
    let own = command.get_arguments().filter(|arg| !arg.is_hide_set());
    let own =
        own.filter_map(|arg| arg.get_long()).filter(|long| !["help", "version"].contains(long));
    own.filter(|long| !told.contains(long)).map(|long| format!("{name} --{long}")).collect()
}

#[test]
fn manual_pages_have_every_command_and_flag_of_the_daemons() {
    for (program, mut command) in super::programs() {
        if program == "sandboxctl" {
            continue;
        }
        command.build();
        let missing = missing(&command, &page(program));
        assert!(missing.is_empty(), "{program}.8 leaves out:\n{}", missing.join("\n"));
    }
}

#[test]
fn command_and_flag_that_a_page_leaves_out_are_found() {
    let flag = |name: &'static str| clap::Arg::new(name).long(name);
    let show = Command::new("show").args([
        flag("all"),
        flag("config"),
        flag("json"),
        flag("old").hide(true),
    ]);
    let hidden = Command::new("shim").hide(true);
    let mut program = Command::new("p").subcommands([show, Command::new("make"), hidden]);
    program.build();
    let page = ".SH SYNOPSIS\n.B p run\n.br\n.B p show\n.RB [ --all ]\n.SH OPTIONS\n.TP\n.BI --config \" FILE\"\n\
                a file\n.SH FILES\n--json\n";
    assert_eq!(missing(&program, page), ["p show --json", "p make"]);
}
