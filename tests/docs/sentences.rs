//! Commands in the sentences and tables of the pages for operators: each is run, or the list here says where it is.

use std::collections::BTreeSet;

use crate::{FOLLOWED, procedures, read};

/// Programs of a node whose command lines are looked for.
const PROGRAMS: &[&str] = &[
    "apt",
    "apt-get",
    "echo",
    "ifdown",
    "ifup",
    "pct",
    "pve-sandbox-agent",
    "pve-sandbox-controller",
    "pvecm",
    "sandboxctl",
    "systemctl",
];

/// Commands that `tests/deb` does not run as they stand in a sentence, and why.
const ELSEWHERE: &[(&str, &str)] = &[
    (
        "apt purge",
        "a name: the block of Uninstall runs it; tests/deb/removal.rs without `uninstall`",
    ),
    ("apt remove pve-sandbox-agent", "tests/deb/removal.rs, where sandboxes are kept"),
    ("pct start", "a name, and the page says not to run it"),
    ("pvecm delnode pve3", "PVE's own, which the lab has not: its lost node stays in the cluster"),
    ("pve-sandbox-agent setup", "of install.md; of operations.md in tests/deb/removal.rs"),
    ("pve-sandbox-agent tunnel setup", "needs Cloudflare: tests/tunnel has one of its own"),
    ("pve-sandbox-agent uninstall --bridge delete", "the block of Uninstall has its other flags"),
    ("pve-sandbox-controller init", "tests/deb/daemons.rs"),
    ("pve-sandbox-controller node-cert", "tests/deb/daemons.rs"),
    ("systemctl enable --now pve-sandbox-tunnel", "needs a tunnel, and so Cloudflare"),
    ("sandboxctl cp", "a name: tests/lxc and cli/tests/shell/copying.rs copy files"),
    ("sandboxctl login NAME --endpoint ... --ca FILE", "a block of Back up and restore"),
];

/// Command lines in backquotes outside of the blocks of a page.
fn commands(text: &str) -> Vec<String> {
    let mut inside = false;
    let prose = text.lines().filter(|line| {
        let fence = line.starts_with("```");
        inside ^= fence;
        !inside && !fence
    });
    let prose = prose.collect::<Vec<_>>().join(" ");
    let quoted = prose.split('`').skip(1).step_by(2);
    let words = quoted.map(|text| text.split_whitespace().collect::<Vec<_>>());
    let commands = words.filter(|words| words.len() > 1 && PROGRAMS.contains(&words[0]));
    commands.map(|words| words.join(" ")).collect()
}

#[test]
fn every_command_in_a_sentence_of_install_and_operations_is_run() {
    let blocks = FOLLOWED.iter().flat_map(|page| procedures::blocks(page));
    let in_blocks = blocks.flat_map(|block| block.commands);
    let in_blocks: BTreeSet<_> =
        in_blocks.map(|command| procedures::on_the_node(&command)).collect();
    let (mut there, mut wrong) = (BTreeSet::new(), Vec::new());
    for page in FOLLOWED {
        for command in commands(&read(page)) {
            let is_run = in_blocks.contains(&procedures::on_the_node(&command))
                || procedures::SENTENCES.contains(&(*page, command.as_str()))
                || ELSEWHERE.iter().any(|(name, _)| *name == command);
            if !is_run {
                wrong.push(format!("docs/{page}: {command}"));
            }
            there.insert((*page, command));
        }
    }
    assert!(there.len() > 20, "the pages were misread: {there:?}");
    assert!(wrong.is_empty(), "not in SENTENCES of procedures.rs:\n{}", wrong.join("\n"));
    let is_there =
        |page: &str, command: &str| there.iter().any(|(on, one)| *on == page && one == command);
    let stale = procedures::SENTENCES.iter().filter(|(page, command)| !is_there(page, command));
    let stale: Vec<_> = stale.collect();
    assert!(stale.is_empty(), "procedures.rs names sentences that are gone: {stale:?}");
    let is_gone = |command: &str| !FOLLOWED.iter().any(|page| is_there(page, command));
    let stale: Vec<_> = ELSEWHERE.iter().filter(|(command, _)| is_gone(command)).collect();
    assert!(stale.is_empty(), "these are gone: {stale:?}");
}

#[test]
fn commands_in_sentences_are_found_over_lines_and_outside_of_blocks() {
    let text = "Run `pct\ndestroy 9000`, not `rm -r /`; `pct` and `uninstall` are names.\n\
                ```console\n# pct list\n`pct start 1`\n```\n| `apt  purge x` | a cell |\n";
    assert_eq!(commands(text), ["pct destroy 9000", "apt purge x"]);
}
