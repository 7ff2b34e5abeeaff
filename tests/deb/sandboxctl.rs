//! The package of `sandboxctl`.

use crate::{root::Root, wanted};

#[test]
fn sandboxctl_is_installed_used_and_removed() {
    if !wanted() {
        return;
    }
    let root = Root::new("sandboxctl");
    root.ok(&["dpkg", "--install", &root.package("sandboxctl")]);
    assert!(root.ok(&["sandboxctl", "version"]).starts_with("sandboxctl "));
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
    root.ok(&["dpkg", "--purge", "sandboxctl"]);
    assert!(!root.has("/usr/bin/sandboxctl"));
}
