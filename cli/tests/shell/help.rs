//! Snapshots of the help texts, so that changes are seen; completion and man pages.

use crate::fake::{Behaviour, Fake};

#[test]
fn help_texts_are_as_recorded() {
    let mut root = cli::args::for_help().term_width(80);
    let mut text = root.render_long_help().to_string();
    let names: Vec<_> = root.get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
    for name in names.iter().filter(|name| *name != "help") {
        let verb = root.find_subcommand_mut(name).expect("listed");
        text.push_str(&format!("\n\n=== {name}\n{}", verb.render_long_help()));
    }
    let forget =
        root.find_subcommand_mut("node").and_then(|node| node.find_subcommand_mut("forget"));
    let forget = forget.expect("listed").render_long_help();
    text.push_str(&format!("\n\n=== node forget\n{forget}"));
    for (name, verb) in [
        ("token", "create"),
        ("token", "ls"),
        ("token", "revoke"),
        ("ssh-key", "add"),
        ("ssh-key", "ls"),
        ("ssh-key", "rm"),
        ("team", "ls"),
        ("team", "get"),
        ("team", "set"),
        ("audit", "ls"),
        ("audit", "export"),
        ("audit", "verify"),
    ] {
        let parent = root.find_subcommand_mut(name);
        let verb = parent.and_then(|parent| parent.find_subcommand_mut(verb)).expect("listed");
        let text_of_it = verb.render_long_help();
        text.push_str(&format!("\n\n=== {name} {}\n{text_of_it}", verb.get_name()));
    }
    let lines: Vec<_> = text.lines().map(str::trim_end).collect();
    insta::assert_snapshot!(lines.join("\n"));
}

#[tokio::test]
async fn completion_scripts_and_man_pages_are_written() {
    let fake = Fake::start(Behaviour::default()).await;
    for (shell, word) in [("bash", "complete "), ("zsh", "#compdef"), ("fish", "complete -c")] {
        let ran = fake.run(&["completion", shell]).await;
        assert!(ran.code == Some(0) && ran.text().contains(word), "{shell}");
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let pages = dir.path().join("man");
    let ran = fake.run(&["man", pages.to_str().expect("utf-8")]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for page in ["sandboxctl.1", "sandboxctl-exec.1"] {
        let text = std::fs::read_to_string(pages.join(page)).expect(page);
        assert!(text.contains(".TH"), "{page}");
    }
    assert!(fake.run(&["man"]).await.text().contains(".SH DESCRIPTION"));
}
