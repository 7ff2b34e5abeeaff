//! The command lines in docs are command lines of the programs: a flag that is renamed, or a verb that is
//! gone, is found here. What they do is tested elsewhere; that no command of an operator's page is left out there
//! is tested here, and so are the links between the pages and the width of help texts.

mod help;
mod hidden;
mod in_the_lab;
mod links;
mod manual;
mod procedures;
mod sentences;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use clap::{Command, CommandFactory as _};

/// Programs of others that docs name, whose words are not checked.
const OTHERS: &[&str] = &["apt", "chown", "cp", "mv", "pct", "rm", "systemctl", "tar", "vzdump"];

/// Pages with blocks of commands for operators.
const PAGES: &[&str] = &["install.md", "local.md", "operations.md", "templates.md", "tunnel.md"];

fn read(page: &str) -> String {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    std::fs::read_to_string(docs.join(page)).expect(page)
}

/// Lines of the blocks of a page that are in this language.
fn blocks<'a>(text: &'a str, language: &'a str) -> impl Iterator<Item = &'a str> {
    let mut inside = false;
    text.lines().filter(move |line| {
        if let Some(fence) = line.strip_prefix("```") {
            inside = !inside && fence == language;
            return false;
        }
        inside
    })
}

/// Words of the commands of a line: quotes hold words together, and a comment ends it. What a command reads
/// from, or is read by, is left out.
fn commands(line: &str) -> Vec<Vec<String>> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in line.chars().chain([' ']) {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, ' ') => words.extend(word.take()),
            (None, '#') if word.is_none() => break,
            (Some(_) | None, c) => word.get_or_insert_default().push(c),
        }
    }
    let of_one = |words: &[String]| {
        let own = words.iter().take_while(|word| !["|", "<"].contains(&word.as_str()));
        own.cloned().collect()
    };
    words
        .split(|word| word == "&&")
        .map(of_one)
        .filter(|words: &Vec<_>| !words.is_empty())
        .collect()
}

fn programs() -> BTreeMap<&'static str, Command> {
    [
        ("sandboxctl", cli::args::Args::command()),
        ("pve-sandbox-agent", agent::commands::Cli::command()),
        ("pve-sandbox-controller", controller::commands::Cli::command()),
    ]
    .into()
}

/// Says what of a line cannot be run; nothing when it is fine.
fn mistakes(line: &str, programs: &BTreeMap<&str, Command>) -> Vec<String> {
    let mut wrong = Vec::new();
    for words in commands(line) {
        let first = words.first().map(String::as_str).unwrap_or_default();
        match programs.get(first) {
            Some(program) => {
                let parsed = program.clone().try_get_matches_from(&words);
                wrong.extend(parsed.err().map(|error| format!("{line}\n{error}")));
            }
            None if OTHERS.contains(&first) => {}
            None => wrong.push(format!("{line}\n{first} is no program that is known here")),
        }
    }
    wrong
}

#[test]
fn every_command_of_an_operator_in_docs_is_parsed_by_its_program() {
    let programs = programs();
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for page in PAGES {
        let text = read(page);
        // Lines with a prompt are commands, the others are their output.
        for line in blocks(&text, "console").filter_map(|line| line.strip_prefix("# ")) {
            seen += 1;
            let mistakes = mistakes(line, &programs).into_iter();
            wrong.extend(mistakes.map(|why| format!("docs/{page}: {why}")));
        }
    }
    assert!(seen > 50, "the pages were misread: {seen} lines");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_line_of_the_tour_of_sandboxctl_is_parsed() {
    let (programs, text) = (programs(), read("sandboxctl.md"));
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for line in blocks(&text, "sh").filter(|line| line.starts_with("sandboxctl ")) {
        seen += 1;
        wrong.extend(mistakes(line, &programs));
    }
    assert!(seen > 50, "the page was misread: {seen} lines");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn renamed_flag_in_docs_would_be_found() {
    let programs = programs();
    for bad in [
        "sandboxctl node drain pve2 --wiat",
        "sandboxctl nod ls",
        "sandboxctl node drain",
        "pve-sandbox-agent doctor --jsn",
        "pve-sandbox-controller token create --scope admin",
        "sandboxclt ls",
    ] {
        assert_eq!(mistakes(bad, &programs).len(), 1, "{bad}");
    }
    let good = "sandboxctl node cordon pve2 --why 'new disks'   # a comment";
    assert_eq!(mistakes(good, &programs), [""; 0]);
}

/// Pages whose commands `tests/deb` runs, and those that need a second node `tests/lxc`, which runs all of local.md,
/// too.
const FOLLOWED: &[&str] = &["install.md", "operations.md"];

#[test]
fn every_command_of_install_and_operations_is_run() {
    let in_the_lab = in_the_lab::IN_THE_LAB.iter().map(|heading| ("operations.md", *heading, 0));
    let run: BTreeSet<_> = procedures::RUN.iter().copied().chain(in_the_lab).collect();
    let named = procedures::RUN.len() + in_the_lab::IN_THE_LAB.len();
    assert_eq!(run.len(), named, "a block is named twice");
    let mut wrong = Vec::new();
    let (mut there, mut commands) = (BTreeSet::new(), BTreeSet::new());
    let pages: Vec<_> = FOLLOWED.iter().map(|page| (*page, procedures::blocks(page))).collect();
    for (page, block) in pages.iter().flat_map(|(page, all)| all.iter().map(move |one| (page, one)))
    {
        let is_run = run.contains(&(*page, block.heading.as_str(), block.number));
        there.insert((*page, block.heading.as_str(), block.number));
        for command in &block.commands {
            commands.insert(command.as_str());
            if !is_run {
                wrong.push(format!("docs/{page}, {}: {command}", block.heading));
            }
        }
    }
    assert!(commands.len() > 40, "the pages were misread: {commands:?}");
    assert!(wrong.is_empty(), "not in RUN of procedures.rs:\n{}", wrong.join("\n"));
    let stale: Vec<_> = run.difference(&there).collect();
    assert!(stale.is_empty(), "procedures.rs names blocks that are gone: {stale:?}");
}

#[test]
fn commands_that_are_run_name_the_node_of_the_tests() {
    let blocks = FOLLOWED.iter().flat_map(|page| procedures::blocks(page));
    let commands = blocks.flat_map(|block| block.commands);
    let run: Vec<_> = commands.map(|command| procedures::on_the_node(&command)).collect();
    for command in &run {
        for example in ["pve2", "pve3", "apt ", "REPO"] {
            assert!(!command.contains(example), "{command} has {example}");
        }
        // A comment that is not cut off would hide what follows it.
        assert!(!command.contains(" #"), "{command}");
    }
    assert!(run.iter().any(|command| command == "sandboxctl node drain pve1 --wait"), "{run:?}");
}

#[test]
fn block_without_a_prompt_is_one_command() {
    let blocks = procedures::blocks("install.md");
    let mut commands = blocks.iter().flat_map(|block| &block.commands);
    let script = commands.find(|command| command.starts_with("for node in ")).expect("the loop");
    assert!(script.contains("; do\n") && script.ends_with("\ndone"), "{script}");
}

#[test]
fn blocks_are_read_by_heading_with_their_commands_alone() {
    let blocks = procedures::blocks("operations.md");
    let rotate: Vec<_> = blocks.iter().filter(|block| block.heading == "Rotate").collect();
    assert_eq!(rotate.iter().map(|block| block.number).collect::<Vec<_>>(), [0, 1, 2]);
    let first = rotate[0].commands.first().map(String::as_str);
    assert_eq!(first, Some("sandboxctl node revoke pve2"), "without its comment");
}
