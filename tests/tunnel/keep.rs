//! The agent's upkeep of a tunnel: what differs from its settings is found by `doctor` and put right by the agent.

use std::{fs, sync::Arc};

use agent::{
    hand_edits::HandEdits,
    tunnel::{
        keep::{Keeper, Work},
        look, node,
    },
};

use crate::world::{NOW_MS, World, host, only, set_up};

fn keeper(world: &World) -> Keeper {
    Keeper::new(world.node.clone(), world.origin.clone())
}

#[tokio::test]
async fn edit_by_hand_is_found_put_back_without_a_restart_and_recorded() {
    let (_cloud, world) = set_up().await;
    let path = world.node.paths().config();
    let before = fs::read_to_string(&path).expect("read");
    let edits = Arc::new(HandEdits::default());
    let mut keeper = keeper(&world).recording(Arc::clone(&edits));
    assert_eq!(keeper.look().await.expect("looked"), Work { writes: false, restarts: false });
    fs::write(&path, before.replace("8480", "8006")).expect("edited");
    only(&world.findings(None).await, "tunnel-config", "systemctl restart pve-sandbox-agent");
    let pid = world.pid();
    assert_eq!(keeper.look().await.expect("looked"), Work { writes: true, restarts: false });
    assert_eq!(fs::read_to_string(&path).expect("read"), before);
    assert_eq!((world.findings(None).await, world.pid()), (vec![], pid));
    assert_eq!(edits.count(), 1);
    fs::remove_file(&path).expect("removed");
    only(&world.findings(None).await, "tunnel-config", "systemctl restart pve-sandbox-agent");
    keeper.look().await.expect("looked");
    assert_eq!(world.findings(None).await, []);
    assert_eq!(edits.count(), 2, "a removal is a change, too");
    assert!(edits.recent(0).contains_key(&path.display().to_string()));
}

#[tokio::test]
async fn connector_with_an_edited_configuration_is_restarted_once() {
    let (_cloud, world) = set_up().await;
    let running = world.node.paths().given.join("config.yml");
    let wanted = fs::read_to_string(&running).expect("read");
    fs::write(&running, wanted.replace("8480", "8006"))
        .expect("as if it was started after an edit");
    only(&world.findings(None).await, "tunnel-config", "systemctl restart pve-sandbox-tunnel");
    let mut keeper = keeper(&world);
    assert_eq!(keeper.look().await.expect("looked"), Work { writes: false, restarts: true });
    assert_eq!(world.systemctl(), ["try-restart --no-block pve-sandbox-tunnel"]);
    let ready = node::until_ready(world.metrics, std::time::Duration::from_secs(10)).await;
    assert!(ready.is_some());
    assert_eq!(world.findings(None).await, []);
    // A restart that does not help is not repeated for ever.
    fs::write(&running, "other").expect("written");
    assert_eq!(keeper.look().await.expect("looked"), Work { writes: false, restarts: false });
}

#[tokio::test]
async fn change_of_the_domain_is_taken_over_and_its_record_is_asked_for() {
    let (cloud, mut world) = set_up().await;
    world.origin.domain = host("example.org");
    let edits = Arc::new(HandEdits::default());
    let mut keeper = keeper(&world).recording(Arc::clone(&edits));
    assert_eq!(keeper.look().await.expect("looked"), Work { writes: true, restarts: true });
    assert_eq!(edits.count(), 0, "nobody has changed the file");
    let text = fs::read_to_string(world.node.paths().config()).expect("read");
    assert!(text.contains("*.example.org") && !text.contains("example.com"), "{text}");
    node::until_ready(world.metrics, std::time::Duration::from_secs(10)).await.expect("restarted");
    only(&world.findings(None).await, "tunnel", "tunnel setup");
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
