//! What a test does to the machine of a daemon: breaks something, sees the finding of `doctor`, and runs its remedy.

use std::process::{Command, Stdio};

use daemon::doctor::Check;

/// Checks that the test runs as root: it gives files to others, or makes a network namespace.
pub(crate) fn assert_root() {
    assert!(nix::unistd::geteuid().is_root(), "run this test as root");
}

/// Machine of a daemon, in a root of its own.
pub(crate) trait Patient {
    /// Returns the directory of the programs that come before the machine's.
    fn programs(&self) -> String;

    /// Returns the variables of the shell.
    fn variables(&self) -> Vec<(&'static str, String)>;

    /// Returns what is wrong.
    async fn findings(&self) -> Vec<Check>;

    /// Runs a remedy, as an operator does.
    async fn run(&self, remedy: &str);

    /// Runs a line of the shell, as an operator does.
    #[track_caller]
    fn sh(&self, line: &str) {
        let done = Command::new("/bin/sh")
            .args(["-ec", line])
            .env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.programs()))
            .envs(self.variables())
            .stdin(Stdio::null())
            .status()
            .expect("a shell");
        assert!(done.success(), "{line}");
    }

    /// Breaks something, sees the finding, runs its remedy, and sees that nothing is wrong any more.
    async fn is_mended(&self, name: &str, breaks: &str) {
        self.sh(breaks);
        let found = self.findings().await;
        let finding = found.iter().find(|check| check.name == name);
        let finding = finding.unwrap_or_else(|| panic!("{name} after {breaks}: {found:?}"));
        let remedy = finding.remedy.clone().expect("a remedy");
        self.run(&remedy).await;
        assert_eq!(self.findings().await, [], "{name} after {breaks}, and {remedy}");
    }
}
