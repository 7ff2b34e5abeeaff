//! The package of `sandboxctl`.

use std::{fs, io::Write as _};

use crate::{root::Root, steps::upstream, wanted};

#[test]
fn sandboxctl_is_installed_used_and_removed() {
    if !wanted() {
        return;
    }
    let root = Root::new("sandboxctl");
    root.ok(&["dpkg", "--install", &root.package("sandboxctl")]);
    let version = root.ok(&["dpkg-query", "--show", "--showformat", "${Version}", "sandboxctl"]);
    let says = format!("sandboxctl {}", upstream(&version));
    assert_eq!(root.ok(&["sandboxctl", "--version"]).trim(), says);
    assert_eq!(root.ok(&["sandboxctl", "version"]).lines().next(), Some(says.as_str()));
    let (code, text) = root.run(&["sandboxctl", "ls"]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("hint: `sandboxctl login` asks"), "{text}");
    for file in [
        "/usr/share/man/man1/sandboxctl.1.gz",
        "/usr/share/man/man1/sandboxctl-exec.1.gz",
        "/usr/share/bash-completion/completions/sandboxctl",
        "/usr/share/zsh/vendor-completions/_sandboxctl",
        "/usr/share/doc/sandboxctl/copyright",
    ] {
        // dpkg may be configured to leave manuals and documents out of a small root.
        let told = root.ok(&["dpkg", "--listfiles", "sandboxctl"]);
        assert!(told.lines().any(|line| line == file), "{file}");
    }
    let program = "/usr/bin/sandboxctl";
    let verify = || root.run(&["dpkg", "--verify", "sandboxctl"]).1;
    assert!(!verify().contains(program), "{}", verify());
    let mut file = fs::OpenOptions::new().append(true).open(root.path(program)).expect("there");
    file.write_all(b"x").expect("changed");
    drop(file);
    assert!(verify().contains(program), "dpkg finds the changed file");
    root.ok(&["dpkg", "--purge", "sandboxctl"]);
    assert!(!root.has("/usr/bin/sandboxctl"));
}
