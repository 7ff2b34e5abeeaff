//! What `doctor` says of a tunnel whose program, unit, connector, files or records are not right: each flaw is made,
//! found, and gone after its remedy. Flaws of the configuration are in `keep`.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
};

use agent::tunnel::{
    node::{self, Paths},
    setup::Order,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use crate::world::{NOW_MS, World, only, set_up};

/// A year, milliseconds.
const YEAR_MS: u64 = 365 * 24 * 3_600_000;

#[tokio::test]
async fn absent_and_outdated_cloudflared_is_found_until_it_is_installed() {
    let (_cloud, world) = set_up().await;
    let paths = Paths { cloudflared: world.file("cloudflared"), ..world.node.paths().clone() };
    let found = async |now_ms| world.findings_at(&paths, None, now_ms).await;
    only(&found(NOW_MS).await, "cloudflared", "apt-get install cloudflared");
    // As apt-get does.
    symlink(&world.node.paths().cloudflared, &paths.cloudflared).expect("installed");
    assert_eq!(found(NOW_MS).await, []);

    let later = NOW_MS + YEAR_MS;
    only(&found(later).await, "cloudflared", "apt-get update; apt-get install cloudflared");
    let newer = "#!/bin/sh\necho 'cloudflared version 2027.10.1 (built 2027-10-20-1200 UTC)'\n";
    fs::remove_file(&paths.cloudflared).expect("removed");
    fs::write(&paths.cloudflared, newer).expect("written");
    fs::set_permissions(&paths.cloudflared, fs::Permissions::from_mode(0o755)).expect("set");
    assert_eq!(found(later).await, []);
}

#[tokio::test]
async fn unit_that_is_not_enabled_or_that_nobody_can_ask_for_is_found() {
    let (_cloud, world) = set_up().await;
    let paths = Paths { systemd: world.file("no-systemd"), ..world.node.paths().clone() };
    only(&world.findings_at(&paths, None, NOW_MS).await, "tunnel-unit", "systemctl status");
    fs::create_dir(&paths.systemd).expect("systemd runs");
    assert_eq!(world.findings_at(&paths, None, NOW_MS).await, []);

    fs::remove_file(world.file("enabled")).expect("disabled");
    let all = world.findings_at(&paths, None, NOW_MS).await;
    only(&all, "tunnel-unit", "systemctl enable pve-sandbox-tunnel");
    world.node.systemctl(&["enable", "pve-sandbox-tunnel"]).await.expect("as the remedy says");
    assert_eq!(world.findings_at(&paths, None, NOW_MS).await, []);
}

#[tokio::test]
async fn each_flaw_of_the_credentials_is_mended_by_its_remedy() {
    let (cloud, world) = set_up().await;
    let path = world.node.paths().credentials();
    let found = async || world.findings(None).await;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("set");
    only(&found().await, "tunnel-credentials", &format!("chmod 600 {}", path.display()));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("set");
    assert_eq!(found().await, []);

    let other = fs::read_to_string(&path).expect("read").replace("f70ff985", "00000000");
    fs::write(&path, other).expect("written");
    only(&found().await, "tunnel-credentials", "tunnel setup");
    world.setup(&cloud, &world.order()).await.1.expect("mended");
    assert_eq!(found().await, []);

    fs::remove_file(&path).expect("removed");
    only(&found().await, "tunnel-credentials", "tunnel setup");
    world.setup(&cloud, &world.order()).await.1.expect("mended");
    assert_eq!(found().await, []);
}

#[tokio::test]
async fn record_tunnel_and_token_that_are_gone_are_found_and_mended() {
    let (cloud, world) = set_up().await;
    let found = async || world.findings(Some(&cloud)).await;
    cloud.state().records.clear();
    only(&found().await, "tunnel-record", "tunnel setup");
    world.setup(&cloud, &world.order()).await.1.expect("mended");
    assert_eq!(found().await, []);

    // Somebody's own record is in its place.
    cloud.state().records.clear();
    cloud.add_record(&json!({
        "type": "A", "name": "*.example.com", "content": "192.0.2.1", "proxied": true, "ttl": 1, "comment": "shop",
    }));
    only(&found().await, "tunnel-record", "--replace-record");
    let replace = Order { replace_record: true, ..world.order() };
    world.setup(&cloud, &replace).await.1.expect("mended");
    assert_eq!(found().await, []);

    cloud.state().tunnels.clear();
    only(&found().await, "tunnel-cloud", "tunnel setup");
    world.setup(&cloud, &world.order()).await.1.expect("mended");
    assert_eq!(found().await, []);

    cloud.state().token = None;
    only(&found().await, "tunnel-cloud", "another token");
    cloud.state().token = Some("active");
    assert_eq!(found().await, []);
}

#[tokio::test]
async fn connector_that_is_down_or_alone_is_found() {
    let (_cloud, world) = set_up().await;
    let pid = || Pid::from_raw(world.pid().expect("it runs"));
    // Its edge is gone.
    let edge = world.node.paths().given.join("edge");
    fs::write(&edge, "0").expect("written");
    only(&world.findings(None).await, "tunnel-ready", "journalctl -u pve-sandbox-tunnel");
    fs::remove_file(&edge).expect("removed");
    assert_eq!(world.findings(None).await, []);
    // SIGHUP ends it, so no reload may send it.
    kill(pid(), Signal::SIGHUP).expect("sent");
    let gone = |world: &World| {
        let pid = world.pid().expect("a pid");
        fs::read_link(format!("/proc/{pid}/exe")).is_err()
    };
    world.until("it ends by SIGHUP", gone).await;
    let all = world.findings(None).await;
    let names: Vec<_> = all.iter().map(|check| check.name).collect();
    assert_eq!(names, ["tunnel-unit", "tunnel-ready"], "{all:?}");
    world.node.systemctl(&["restart", "pve-sandbox-tunnel"]).await.expect("as the remedy says");
    node::until_ready(world.metrics, std::time::Duration::from_secs(10)).await.expect("ready");
    assert_eq!(world.findings(None).await, []);
    fs::remove_file(world.file("enabled")).expect("removed");
    only(&world.findings(None).await, "tunnel-unit", "systemctl enable pve-sandbox-tunnel");
}

#[tokio::test]
async fn record_that_leads_elsewhere_is_found_with_a_token_and_mended_by_setup() {
    let (cloud, world) = set_up().await;
    assert_eq!(world.findings(Some(&cloud)).await, []);
    let elsewhere = "00000000-a4ef-4643-bbbc-4a0ed4fc8415.cfargotunnel.com";
    for record in cloud.state().records.values_mut().flatten() {
        record["content"] = json!(elsewhere);
    }
    assert_eq!(world.findings(None).await, [], "without a token nobody can tell");
    only(&world.findings(Some(&cloud)).await, "tunnel-record", "tunnel setup");
    world.setup(&cloud, &world.order()).await.1.expect("mended");
    assert_eq!(world.findings(Some(&cloud)).await, []);
    cloud.state().token = None;
    only(&world.findings(Some(&cloud)).await, "tunnel-cloud", "another token");
}
