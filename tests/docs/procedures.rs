//! Commands of docs/install.md and docs/operations.md that are run on a booted node of Debian: which blocks, and
//! what stands there for an example's name. `tests/docs` checks that nothing is left out, `tests/deb` runs them. What
//! needs a second node is run in the lab: in_the_lab.rs.

use std::path::Path;

/// Blocks that are run, by page, heading and number below that heading.
pub(crate) const RUN: &[(&str, &str, usize)] = &[
    ("install.md", "The first node: three commands", 0),
    ("install.md", "A repository of your own", 0),
    ("install.md", "Each further node: one line", 0),
    ("install.md", "Each further node: one line", 1),
    ("operations.md", "Look", 0),
    ("operations.md", "Upgrade", 0),
    ("operations.md", "Back up and restore", 0),
    ("operations.md", "Back up and restore", 1),
    ("operations.md", "Back up and restore", 2),
    ("operations.md", "The keys that seal secrets", 0),
    ("operations.md", "Lose the controller", 0),
    ("operations.md", "Rotate", 0),
    ("operations.md", "Rotate", 1),
    ("operations.md", "Rotate", 2),
    ("operations.md", "Empty a node", 0),
    ("operations.md", "Adopt a container, or give one back", 0),
    ("operations.md", "Uninstall", 0),
    ("operations.md", "Uninstall", 1),
];

/// Commands in sentences that are run, too, by page.
pub(crate) const SENTENCES: &[(&str, &str)] = &[
    ("install.md", "pve-sandbox-agent setup"),
    ("install.md", "pve-sandbox-agent bridge init"),
    ("install.md", "ifdown vmbr1"),
    ("install.md", "systemctl disable --now pve-sandbox-dns"),
    ("install.md", "sandboxctl node ls -o wide"),
    ("operations.md", "pve-sandbox-controller check-config"),
    ("operations.md", "systemctl disable --now pve-sandbox-controller"),
    ("operations.md", "sandboxctl node cordon pve2"),
    ("operations.md", "pct destroy 9000"),
    (
        "operations.md",
        "echo 'pve-sandbox-agent pve-sandbox-agent/remove-data boolean true' | debconf-set-selections",
    ),
];

/// Replacements in a command of the docs for the node of the tests: nobody can be asked there, there is no
/// network, and there is one node.
const FOR: &[(&str, &str)] = &[
    ("apt update && apt install", "apt-get REPO update && apt-get REPO install --yes"),
    ("apt install", "apt-get install --yes --no-install-recommends"),
    ("apt purge", "apt-get purge --yes"),
    ("REPO", "-o Dir::Etc::SourceList=/etc/apt/pve-sandbox.list -o Dir::Etc::SourceParts=-"),
    (
        "sandboxctl login local",
        "sandboxctl login local --token-file /root/.config/sandboxctl/tokens/local",
    ),
    ("pve2", "pve1"),
    ("pve3", "pve1"),
];

/// A block of a page with the language `console`.
#[derive(Debug)]
pub(crate) struct Block {
    /// Heading above it.
    pub(crate) heading: String,
    /// Number of it below that heading, from 0.
    pub(crate) number: usize,
    /// Its lines with a prompt, without prompt and comment; the others are output. A block without any prompt is one
    /// command, to be copied as a whole.
    pub(crate) commands: Vec<String>,
}

/// Returns the blocks of a page that have commands.
pub(crate) fn blocks(page: &str) -> Vec<Block> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(page);
    let text = std::fs::read_to_string(path).expect(page);
    let (mut found, mut heading, mut fence) = (Vec::<Block>::new(), "", None::<&str>);
    let mut lines = Vec::new();
    for line in text.lines() {
        match (line.strip_prefix("```"), fence) {
            (Some(language), None) => {
                fence = Some(language);
                lines.clear();
                if language == "console" {
                    let number = found.iter().filter(|block| block.heading == heading).count();
                    let heading = heading.to_owned();
                    found.push(Block { heading, number, commands: Vec::new() });
                }
            }
            (Some(_), Some(_)) => {
                fence = None;
                // Only the last block can be empty, and only if its language is `console`.
                if let Some(script) = found.last_mut().filter(|block| block.commands.is_empty()) {
                    script.commands.push(lines.join("\n"));
                }
            }
            (None, Some("console")) => {
                lines.push(line);
                let command = line.strip_prefix("# ").map(bare);
                found.last_mut().expect("a block").commands.extend(command);
            }
            (None, Some(_)) => {}
            (None, None) => heading = line.strip_prefix("## ").unwrap_or(heading),
        }
    }
    found
}

/// Removes the comment, which stands apart by two spaces at least.
fn bare(line: &str) -> String {
    let command = line.split("  #").next().unwrap_or(line);
    command.trim_end().to_owned()
}

/// Returns the command as the node of the tests runs it.
pub(crate) fn on_the_node(command: &str) -> String {
    FOR.iter().fold(command.to_owned(), |text, (from, to)| text.replace(from, to))
}
