//! The connector of the tunnel as a unit of a real systemd: set up against a stand-in for Cloudflare's API inside the
//! node, with the stand-in for cloudflared, until it is taken away again.

#[path = "../tunnel/cloud.rs"]
#[expect(dead_code, reason = "the tests of the tunnel use the rest")]
mod cloud;
#[path = "../tunnel/shapes.rs"]
mod shapes;

use std::{
    fs,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
};

use super::{
    booted::Booted,
    steps::{AGENT, INGRESS, until},
};
use cloud::{Cloud, TOKEN};

const UNIT: &str = "pve-sandbox-tunnel";
/// The domain that the controller tells its nodes.
const DOMAIN: &str = "sandbox.test";
const STANDIN: &str = env!("CARGO_BIN_EXE_cloudflared-standin");
const CLOUDFLARED: &str = "/usr/bin/cloudflared";
const TOKEN_FILE: &str = "/root/cloudflare-token";
/// Files of the connector, and what systemd gives it of them.
const FILES: &str = "/etc/pve-sandbox/tunnel";
const GIVEN: &str = "/run/credentials/pve-sandbox-tunnel.service";
/// Users that systemd makes up for a unit have these numbers.
const DYNAMIC: std::ops::RangeInclusive<u32> = 61_184..=65_519;

/// Sets the connector up on a node that has joined, and takes it away again.
pub(crate) fn connector_runs_under_systemd(node: &Booted) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let inside = runtime.enter();
    let listener = node.listen(([127, 0, 0, 1], 0).into());
    listener.set_nonblocking(true).expect("set");
    let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
    let cloud = Cloud::serve(listener, DOMAIN);
    let tunnel = |verb: &str, flags: &[&str]| {
        let call = [AGENT, "tunnel", verb, "--token-file", TOKEN_FILE, "--api", &cloud.base];
        node.ok(&[&call[..], flags].concat())
    };
    furnish(node);
    // systemd hands credentials over by the propagation of mounts, which it leaves to whoever boots a container.
    node.ok(&["mount", "--make-shared", "/run"]);

    node.ok(&["systemctl", "start", UNIT]);
    assert_eq!(node.unit(UNIT, "ActiveState"), "inactive", "nothing was set up");
    let controller = ["--controller-host", "api.sandbox.test"];
    let address = ["--controller-address", "192.0.2.11:7443"];
    let told = tunnel("setup", &[controller, address].concat());
    assert!(told.contains("4 connections"), "it has read its credentials: {told}");
    until_active(node, None);
    assert_eq!(node.unit(UNIT, "UnitFileState"), "enabled");
    only_the_connector_reads_its_files(node);
    let told = tunnel("status", &[]);
    assert!(told.contains("4 connections") && told.contains("*.sandbox.test"), "{told}");
    assert!(tunnel("setup", &[]).contains("nothing is to be changed"), "a second run");

    // It dies of what reloads others.
    let before = node.unit(UNIT, "MainPID");
    node.ok(&["systemctl", "kill", "--signal=HUP", UNIT]);
    until_active(node, Some(&before));

    tunnel("teardown", &["--everything"]);
    assert_eq!(node.unit(UNIT, "ActiveState"), "inactive");
    assert_eq!(node.unit(UNIT, "UnitFileState"), "disabled");
    for gone in [FILES, GIVEN] {
        assert_eq!(node.run(&["test", "-e", gone]).0, Some(1), "{gone}");
    }
    assert_eq!((cloud.records(), cloud.state().tunnels.len()), (vec![], 0));
    node.ok(&["rm", CLOUDFLARED, TOKEN_FILE]);
    drop(cloud);
    drop(inside);
}

/// Puts cloudflared's stand-in and the token into the node.
fn furnish(node: &Booted) {
    let at = node.path(CLOUDFLARED);
    fs::copy(STANDIN, &at).expect("the stand-in");
    fs::set_permissions(&at, fs::Permissions::from_mode(0o755)).expect("executable");
    let mut token = fs::OpenOptions::new();
    let token = token.write(true).create_new(true).mode(0o600).open(node.path(TOKEN_FILE));
    std::io::Write::write_all(&mut token.expect("a file"), TOKEN.as_bytes()).expect("written");
}

/// Waits until systemd has heard that the connector is connected; with `before`, in another process than that.
#[track_caller]
fn until_active(node: &Booted, before: Option<&str>) {
    let is_active = || {
        node.unit(UNIT, "ActiveState") == "active"
            && before.is_none_or(|before| node.unit(UNIT, "MainPID") != before)
    };
    let log = || node.run(&["journalctl", "--no-pager", "-n", "30", "-u", UNIT]).1;
    until("the connector", log, is_active);
}

/// Checks that neither the connector's user nor another one reads the files of root, and that no other user reads
/// what systemd has given it of them.
fn only_the_connector_reads_its_files(node: &Booted) {
    let user = node.unit(UNIT, "UID");
    assert!(user.parse().is_ok_and(|user| DYNAMIC.contains(&user)), "user {user}");
    let as_user = |user: &str, group: &str, path: &str| {
        let become_it = [format!("--reuid={user}"), format!("--regid={group}")];
        let [reuid, regid] = &become_it;
        node.run(&["setpriv", reuid, regid, "--clear-groups", "cat", path])
    };
    let refused = |user: &str, group: &str, path: &str| {
        let (code, told) = as_user(user, group, path);
        let is_refused = code != Some(0) && told.contains("Permission denied");
        assert!(is_refused, "{path} as {user}: {code:?} {told}");
    };
    for name in ["credentials.json", "config.yml"] {
        let (file, given) = (format!("{FILES}/{name}"), format!("{GIVEN}/{name}"));
        assert_eq!(node.ok(&["cat", &file]), node.ok(&["cat", &given]), "{name} as it is given");
        let (code, told) = as_user(&user, &user, &given);
        assert_eq!(code, Some(0), "{given} as the connector: {told}");
        refused(&user, &user, &file);
        for (user, group) in [("nobody", "nogroup"), (INGRESS, INGRESS)] {
            refused(user, group, &file);
            refused(user, group, &given);
        }
    }
    // The rule of the controller names this file, which is no secret.
    let (code, told) = as_user(&user, &user, "/etc/pve-sandbox/tls/ca.crt");
    assert_eq!(code, Some(0), "the CA as the connector: {told}");
}
