//! The agent's upkeep, and what `doctor` says of a tunnel: each flaw is made, found, and gone after its remedy.

use std::fs;

use agent::tunnel::{
    judge,
    keep::{Keeper, Work},
    look, node,
};
use daemon::doctor::{Check, State};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use crate::{
    cloud::Cloud,
    world::{World, api, host},
};

/// 2026-11-30.
const NOW_MS: u64 = 1_796_000_000_000;

async fn found(world: &World, cloud: Option<&Cloud>) -> Vec<Check> {
    let api = cloud.map(api);
    let paths = world.node.paths();
    let facts = look::look(paths, Some(&world.origin), api.as_ref(), NOW_MS).await;
    let facts = facts.expect("seen").expect("set up");
    let all = judge::checks(&facts, paths).into_iter();
    all.filter(|check| check.state != State::Ok).collect()
}

#[track_caller]
fn only(found: &[Check], name: &str, remedy: &str) {
    let [one] = found else { panic!("{name}: {found:?}") };
    assert_eq!(one.name, name);
    assert!(one.remedy.as_deref().is_some_and(|text| text.contains(remedy)), "{one:?}");
}

async fn set_up() -> (Cloud, World) {
    let (cloud, world) = (Cloud::start().await, World::new());
    world.setup(&cloud, &world.order()).await.1.expect("set up");
    world.systemctl();
    (cloud, world)
}

fn keeper(world: &World) -> Keeper {
    Keeper::new(world.node.clone(), world.origin.clone())
}

#[tokio::test]
async fn edit_by_hand_is_found_and_put_back_without_a_restart() {
    let (_cloud, world) = set_up().await;
    let path = world.node.paths().config();
    let before = fs::read_to_string(&path).expect("read");
    let mut keeper = keeper(&world);
    assert_eq!(keeper.look().await.expect("looked"), Work { writes: false, restarts: false });
    fs::write(&path, before.replace("8480", "8006")).expect("edited");
    only(&found(&world, None).await, "tunnel-config", "systemctl restart pve-sandbox-agent");
    let pid = world.pid();
    assert_eq!(keeper.look().await.expect("looked"), Work { writes: true, restarts: false });
    assert_eq!(fs::read_to_string(&path).expect("read"), before);
    assert_eq!((found(&world, None).await, world.pid()), (vec![], pid));
    fs::remove_file(&path).expect("removed");
    only(&found(&world, None).await, "tunnel-config", "systemctl restart pve-sandbox-agent");
    keeper.look().await.expect("looked");
    assert_eq!(found(&world, None).await, []);
}

#[tokio::test]
async fn connector_with_an_edited_configuration_is_restarted_once() {
    let (_cloud, world) = set_up().await;
    let running = world.node.paths().given.join("config.yml");
    let wanted = fs::read_to_string(&running).expect("read");
    fs::write(&running, wanted.replace("8480", "8006"))
        .expect("as if it was started after an edit");
    only(&found(&world, None).await, "tunnel-config", "systemctl restart pve-sandbox-tunnel");
    let mut keeper = keeper(&world);
    assert_eq!(keeper.look().await.expect("looked"), Work { writes: false, restarts: true });
    assert_eq!(world.systemctl(), ["try-restart --no-block pve-sandbox-tunnel"]);
    let ready = node::until_ready(world.metrics, std::time::Duration::from_secs(10)).await;
    assert!(ready.is_some());
    assert_eq!(found(&world, None).await, []);
    // A restart that does not help is not repeated for ever.
    fs::write(&running, "other").expect("written");
    assert_eq!(keeper.look().await.expect("looked"), Work { writes: false, restarts: false });
}

#[tokio::test]
async fn change_of_the_domain_is_taken_over_and_its_record_is_asked_for() {
    let (cloud, mut world) = set_up().await;
    world.origin.domain = host("example.org");
    let mut keeper = keeper(&world);
    assert_eq!(keeper.look().await.expect("looked"), Work { writes: true, restarts: true });
    let text = fs::read_to_string(world.node.paths().config()).expect("read");
    assert!(text.contains("*.example.org") && !text.contains("example.com"), "{text}");
    node::until_ready(world.metrics, std::time::Duration::from_secs(10)).await.expect("restarted");
    only(&found(&world, None).await, "tunnel", "tunnel setup");
    cloud.calls();
}

#[tokio::test]
async fn configuration_that_cloudflared_refuses_is_not_written() {
    let (_cloud, mut world) = set_up().await;
    let path = world.node.paths().config();
    let before = fs::read_to_string(&path).expect("read");
    for (from, to) in [("http_status:404", "nonsense"), ("  - service: http_status:404\n", "")] {
        let error = world.node.validate(&before.replace(from, to)).await.expect_err("refused");
        assert!(matches!(error, node::Error::Invalid(_)), "{error}");
    }
    world.node.validate(&before).await.expect("accepted");
    assert_eq!(
        fs::read_dir(&world.node.paths().dir).expect("listed").count(),
        3,
        "no draft is left"
    );
    world.origin.domain = host("example.org");
    keeper(&world).look().await.expect("a good one is");
}

#[tokio::test]
async fn agent_without_a_tunnel_touches_nothing() {
    let world = World::new();
    assert_eq!(
        keeper(&world).look().await.expect("looked"),
        Work { writes: false, restarts: false }
    );
    assert!(!world.node.paths().dir.exists());
    let facts = look::look(world.node.paths(), Some(&world.origin), None, NOW_MS).await;
    assert!(facts.expect("seen").is_none());
}

#[tokio::test]
async fn connector_that_is_down_or_alone_is_found() {
    let (_cloud, world) = set_up().await;
    let pid = || Pid::from_raw(world.pid().expect("it runs"));
    // Its edge is gone.
    let edge = world.node.paths().given.join("edge");
    fs::write(&edge, "0").expect("written");
    only(&found(&world, None).await, "tunnel-ready", "journalctl -u pve-sandbox-tunnel");
    fs::remove_file(&edge).expect("removed");
    assert_eq!(found(&world, None).await, []);
    // SIGHUP ends it, so no reload may send it.
    kill(pid(), Signal::SIGHUP).expect("sent");
    let gone = |world: &World| {
        let pid = world.pid().expect("a pid");
        fs::read_link(format!("/proc/{pid}/exe")).is_err()
    };
    world.until("it ends by SIGHUP", gone).await;
    let all = found(&world, None).await;
    let names: Vec<_> = all.iter().map(|check| check.name).collect();
    assert_eq!(names, ["tunnel-unit", "tunnel-ready"], "{all:?}");
    world.node.systemctl(&["restart", "pve-sandbox-tunnel"]).await.expect("as the remedy says");
    node::until_ready(world.metrics, std::time::Duration::from_secs(10)).await.expect("ready");
    assert_eq!(found(&world, None).await, []);
    fs::remove_file(world.file("enabled")).expect("removed");
    only(&found(&world, None).await, "tunnel-unit", "systemctl enable pve-sandbox-tunnel");
}

#[tokio::test]
async fn secret_that_others_can_read_or_that_is_gone_is_found() {
    use std::os::unix::fs::PermissionsExt as _;
    let (_cloud, world) = set_up().await;
    let path = world.node.paths().credentials();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("set");
    only(&found(&world, None).await, "tunnel-credentials", "chmod 600");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("set");
    let text = fs::read_to_string(&path).expect("read");
    let other = text.replace("f70ff985", "00000000");
    fs::write(&path, other).expect("written");
    only(&found(&world, None).await, "tunnel-credentials", "tunnel setup");
    fs::remove_file(&path).expect("removed");
    only(&found(&world, None).await, "tunnel-credentials", "tunnel setup");
}

#[tokio::test]
async fn record_that_leads_elsewhere_is_found_with_a_token_and_mended_by_setup() {
    let (cloud, world) = set_up().await;
    assert_eq!(found(&world, Some(&cloud)).await, []);
    let elsewhere = "00000000-a4ef-4643-bbbc-4a0ed4fc8415.cfargotunnel.com";
    for record in cloud.state().records.values_mut().flatten() {
        record["content"] = json!(elsewhere);
    }
    assert_eq!(found(&world, None).await, [], "without a token nobody can tell");
    only(&found(&world, Some(&cloud)).await, "tunnel-record", "tunnel setup");
    world.setup(&cloud, &world.order()).await.1.expect("mended");
    assert_eq!(found(&world, Some(&cloud)).await, []);
    cloud.state().token = None;
    only(&found(&world, Some(&cloud)).await, "tunnel-cloud", "another token");
}
