//! Caddy as a program, and addresses for it, for the tests of the ingress and for its bench.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::{Child, Command, Stdio},
};

use agent::ingress::version::Version;

/// Caddy that Debian ships.
pub(crate) const DEBIAN: &str = "/usr/bin/caddy";

/// Returns a loopback address that no concurrent run uses.
pub(crate) fn ip(last: u8) -> Ipv4Addr {
    let [.., high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 100 + high % 100, low, last)
}

/// Returns such an address with a port.
pub(crate) fn at(last: u8, port: u16) -> SocketAddr {
    SocketAddr::from((ip(last), port))
}

/// Returns the version of a Caddy.
#[expect(clippy::disallowed_methods, reason = "tests start Caddy themselves")]
pub(crate) fn version(program: &Path) -> Version {
    let told = Command::new(program).arg("version").output();
    let told = String::from_utf8(told.expect("Caddy starts").stdout).expect("text");
    told.parse().expect("a version")
}

/// Unit of the ingress.
const UNIT: &str = include_str!("../../systemd/pve-sandbox-ingress.service");

/// Lists the variables by which the unit of the ingress sets up Go's memory, as it sets them.
pub(crate) fn memory() -> Vec<(&'static str, &'static str)> {
    let lines = UNIT.lines().filter_map(|line| line.strip_prefix("Environment="));
    let pairs = lines.flat_map(str::split_whitespace).filter_map(|pair| pair.split_once('='));
    pairs.filter(|(name, _)| name.starts_with("GO")).collect()
}

/// Runs a Caddy with this configuration and these variables; its files, with its log among them, are in `dir`.
#[expect(clippy::disallowed_methods, reason = "tests start Caddy themselves")]
pub(crate) fn run(program: &Path, config: &Path, dir: &Path, env: &[(&str, &str)]) -> Child {
    let log = std::fs::File::options().append(true).create(true).open(dir.join("caddy.log"));
    let log = log.expect("a file");
    Command::new(program)
        .arg("run")
        .arg("--config")
        .arg(config)
        .env_clear()
        .env("HOME", dir)
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("Caddy starts")
}

/// Lets this process, and what it starts, open so many files.
#[expect(clippy::disallowed_methods, reason = "tests start programs themselves")]
pub(crate) fn raise_descriptors(most: u32) {
    let pid = std::process::id().to_string();
    let limit = format!("--nofile={most}:");
    let raised = Command::new("prlimit").args(["--pid", &pid, &limit]).status();
    assert!(raised.expect("prlimit starts").success(), "the limit of open files is too low");
}
