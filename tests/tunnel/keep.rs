//! The agent's upkeep of a tunnel: what differs from its settings is found by `doctor` and put right by the agent.

use std::{fs, os::unix::fs::PermissionsExt as _, sync::Arc, time::Duration};

use agent::{
    hand_edits::HandEdits,
    tunnel::{
        keep::{Keeper, Work},
        look,
        node::{self, Problem},
    },
};

use crate::world::{NOW_MS, REFUSAL, World, host, only, set_up, set_up_in};

const RESTART: &str = "restart --no-block pve-sandbox-tunnel";

fn keeper(world: &World) -> Keeper {
    Keeper::new(world.node.clone(), world.origin.clone())
}

/// Lets the connector run with another configuration than the settings' one, which this returns.
fn edited(world: &World) -> String {
    let running = world.node.paths().given.join("config.yml");
    let wanted = fs::read_to_string(&running).expect("read");
    fs::write(&running, wanted.replace("8480", "8006"))
        .expect("as if it was started after an edit");
    wanted
}

fn running(world: &World) -> String {
    fs::read_to_string(world.node.paths().given.join("config.yml")).expect("it runs")
}

/// Returns the names of what `doctor` finds wrong.
async fn found(world: &World) -> Vec<&'static str> {
    world.findings(None).await.iter().map(|check| check.name).collect()
}

/// Lets time pass for the keeper, and for none of the programs.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

#[tokio::test]
async fn edit_by_hand_is_found_put_back_without_a_restart_and_recorded() {
    let (_cloud, world) = set_up().await;
    let path = world.node.paths().config();
    let before = fs::read_to_string(&path).expect("read");
    let edits = Arc::new(HandEdits::default());
    let mut keeper = keeper(&world).recording(Arc::clone(&edits));
    assert_eq!(keeper.look().await.expect("looked"), Work::default());
    fs::write(&path, before.replace("8480", "8006")).expect("edited");
    only(&world.findings(None).await, "tunnel-config", "systemctl restart pve-sandbox-agent");
    let pid = world.pid();
    assert_eq!(keeper.look().await.expect("looked"), Work { writes: true, ..Work::default() });
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
async fn restart_that_does_not_help_is_told_and_repeated_after_some_minutes() {
    let (_cloud, world) = set_up().await;
    let wanted = edited(&world);
    only(&world.findings(None).await, "tunnel-config", "systemctl restart pve-sandbox-tunnel");
    let mut keeper = keeper(&world);
    assert_eq!(keeper.look().await.expect("looked"), Work { restarts: true, ..Work::default() });
    assert_eq!(world.systemctl(), [RESTART]);
    let ready = node::until_ready(world.metrics, std::time::Duration::from_secs(10)).await;
    assert!(ready.is_some());
    assert_eq!(world.findings(None).await, []);
    // As if the restart had not helped.
    edited(&world);
    for _ in 0..2 {
        let error = keeper.look().await.expect_err("it still runs with another one");
        assert!(matches!(error, node::Error::RunsAnother(1)), "{error}");
        assert_eq!(found(&world).await, ["tunnel-config", "tunnel"]);
    }
    assert_eq!(world.systemctl(), [""; 0], "it is too early");
    pass(Duration::from_secs(120)).await;
    assert_eq!(keeper.look().await.expect("looked"), Work { restarts: true, ..Work::default() });
    assert_eq!((world.systemctl(), running(&world)), (vec![RESTART.to_owned()], wanted));
    node::until_ready(world.metrics, Duration::from_secs(10)).await.expect("restarted");
    assert_eq!(world.findings(None).await, []);
    assert_eq!(keeper.look().await.expect("looked"), Work::default());
}

#[tokio::test]
async fn restart_that_failed_is_repeated_by_the_next_look_and_told_until_it_has_helped() {
    let (_cloud, world) = set_up().await;
    let wanted = edited(&world);
    fs::write(world.file("fails"), "restart").expect("written");
    let mut keeper = keeper(&world);
    for _ in 0..2 {
        let error = keeper.look().await.expect_err("it failed");
        assert!(matches!(error, node::Error::Failed { .. }), "{error}");
        assert_eq!(world.systemctl(), [RESTART]);
        assert_eq!(found(&world).await, ["tunnel-config", "tunnel"]);
    }
    // One that succeeds, and whose effect is not there yet.
    fs::remove_file(world.file("fails")).expect("removed");
    fs::write(world.file("ignores"), "restart").expect("written");
    assert_eq!(keeper.look().await.expect("looked"), Work { restarts: true, ..Work::default() });
    assert!(world.node.paths().problem().exists(), "nobody knows yet that it has helped");
    keeper.look().await.expect_err("it has not");
    assert_eq!(found(&world).await, ["tunnel-config", "tunnel"]);

    fs::remove_file(world.file("ignores")).expect("removed");
    pass(Duration::from_secs(120)).await;
    assert_eq!(keeper.look().await.expect("looked"), Work { restarts: true, ..Work::default() });
    assert_eq!(running(&world), wanted);
    node::until_ready(world.metrics, Duration::from_secs(10)).await.expect("restarted");
    assert_eq!(world.findings(None).await, []);
}

#[tokio::test]
async fn connector_without_a_connection_is_restarted_too() {
    let (_cloud, world) = set_up().await;
    fs::write(world.file("edge"), "0").expect("written");
    world.node.systemctl(&["restart", "pve-sandbox-tunnel"]).await.expect("restarted");
    let state = node::unit_state(world.node.paths()).await.expect("systemd is there");
    assert!(state.is_starting && !state.is_active, "{state:?}");
    let (wanted, pid) = (edited(&world), world.pid());
    // To systemd it was never started, so this does nothing.
    world.node.systemctl(&["try-restart", "pve-sandbox-tunnel"]).await.expect("a success");
    assert_eq!(world.pid(), pid);
    world.systemctl();
    assert_eq!(
        keeper(&world).look().await.expect("looked"),
        Work { restarts: true, ..Work::default() }
    );
    assert_eq!((world.systemctl(), running(&world)), (vec![RESTART.to_owned()], wanted));
    assert_ne!(world.pid(), pid);
}

#[tokio::test]
async fn connector_that_is_being_stopped_is_not_restarted() {
    let (_cloud, world) = set_up().await;
    edited(&world);
    fs::write(world.file("stopping"), "").expect("written");
    assert_eq!(keeper(&world).look().await.expect("looked"), Work::default());
    assert_eq!(world.systemctl(), [""; 0]);
}

#[tokio::test]
async fn change_of_the_domain_is_taken_over_and_its_record_is_asked_for() {
    let (cloud, mut world) = set_up().await;
    world.origin.domain = host("example.org");
    let edits = Arc::new(HandEdits::default());
    let mut keeper = keeper(&world).recording(Arc::clone(&edits));
    assert_eq!(
        keeper.look().await.expect("looked"),
        Work { writes: true, restarts: true, ..Work::default() }
    );
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
async fn refused_configuration_is_neither_written_nor_run_and_its_reason_is_told() {
    let (_cloud, world) = set_up_in(World::with_checker()).await;
    let path = world.node.paths().config();
    let wanted = fs::read_to_string(&path).expect("read");
    let edited = wanted.replace("8480", "8006");
    fs::write(&path, &edited).expect("edited");
    fs::write(world.node.paths().given.join("config.yml"), &edited).expect("as if started with it");
    fs::write(world.file("refuses"), "").expect("written");
    let mut keeper = keeper(&world);
    // The second look does no more than the first.
    for _ in 0..2 {
        let error = keeper.look().await.expect_err("refused");
        assert!(matches!(error, node::Error::Invalid(_)), "{error}");
        assert_eq!(fs::read_to_string(&path).expect("read"), edited);
        assert_eq!(world.systemctl(), [""; 0]);
        let found = world.findings(None).await;
        only(&found, "tunnel-config", "journalctl");
        assert!(found[0].found.contains(REFUSAL), "{found:?}");
    }
    fs::remove_file(world.file("refuses")).expect("removed");
    let work = Work { writes: true, restarts: true, ..Work::default() };
    assert_eq!(keeper.look().await.expect("accepted"), work);
    assert_eq!(fs::read_to_string(&path).expect("read"), wanted);
    node::until_ready(world.metrics, std::time::Duration::from_secs(10)).await.expect("restarted");
    assert_eq!(world.findings(None).await, []);
}

#[tokio::test]
async fn stopped_connector_is_started_with_the_file_of_before_where_the_new_one_is_refused() {
    let (_cloud, mut world) = set_up_in(World::with_checker()).await;
    let path = world.node.paths().config();
    let before = fs::read_to_string(&path).expect("read");
    world.origin.domain = host("example.org");
    fs::write(world.file("refuses"), "").expect("written");
    let stop = async || {
        world.node.systemctl(&["stop", "pve-sandbox-tunnel"]).await.expect("stopped");
        world.systemctl();
    };
    let mut keeper = keeper(&world);
    stop().await;
    let error = keeper.look().await.expect_err("refused");
    assert!(matches!(error, node::Error::Invalid(_)), "{error}");
    assert_eq!(world.systemctl(), ["start --no-block pve-sandbox-tunnel"]);
    node::until_ready(world.metrics, std::time::Duration::from_secs(10)).await.expect("started");
    assert_eq!(fs::read_to_string(&path).expect("read"), before);
    keeper.look().await.expect_err("refused still");
    assert_eq!(world.systemctl(), [""; 0], "it is not restarted for the file that it has");

    // Without a file it cannot start.
    stop().await;
    fs::remove_file(&path).expect("removed");
    keeper.look().await.expect_err("refused still");
    assert_eq!(world.systemctl(), [""; 0]);
}

#[tokio::test]
async fn problem_ends_with_a_setup_and_counts_only_where_the_agent_looks_after_the_connector() {
    let (cloud, world) = set_up().await;
    let paths = world.node.paths();
    let leave = || {
        let problem = Problem { text: "the reason".into(), is_refusal: false };
        node::leave_problem(paths, Some(&problem)).expect("left");
    };
    let problem = async |origin| {
        let facts = look::look(paths, origin, None, NOW_MS).await.expect("seen");
        facts.expect("set up").problem.is_some()
    };
    leave();
    assert!(problem(Some(&world.origin)).await);
    assert!(!problem(None).await, "ingress.domain was removed");
    only(&world.findings(None).await, "tunnel", "journalctl");
    world.setup(&cloud, &world.order()).await.1.expect("right");
    assert_eq!((world.findings(None).await, paths.problem().exists()), (vec![], false));
    leave();
    keeper(&world).look().await.expect("looked");
    assert!(!paths.problem().exists());
}

#[tokio::test]
async fn stopped_connector_is_started_again_unless_its_unit_is_disabled() {
    let (_cloud, world) = set_up().await;
    let stop = async |verb: &[&str]| {
        world.node.systemctl(&[verb, &["pve-sandbox-tunnel"]].concat()).await.expect("stopped");
        world.systemctl();
    };
    let mut keeper = keeper(&world);
    stop(&["stop"]).await;
    assert_eq!(world.pid(), None);
    let starts = Work { starts: true, ..Work::default() };
    assert_eq!(keeper.look().await.expect("looked"), starts);
    assert_eq!(world.systemctl(), ["start --no-block pve-sandbox-tunnel"]);
    node::until_ready(world.metrics, std::time::Duration::from_secs(10)).await.expect("started");
    assert_eq!(keeper.look().await.expect("looked"), Work::default());

    // Without its secret it cannot start.
    stop(&["stop"]).await;
    let (secret, aside) = (world.node.paths().credentials(), world.file("aside"));
    fs::rename(&secret, &aside).expect("moved");
    assert_eq!(keeper.look().await.expect("looked"), Work::default());
    fs::rename(&aside, &secret).expect("moved");

    // An operator wants none on this node.
    stop(&["disable", "--now"]).await;
    assert_eq!(keeper.look().await.expect("looked"), Work::default());
    assert_eq!((world.systemctl(), world.pid()), (vec![], None));
}

#[tokio::test]
async fn secret_that_others_can_read_is_taken_from_them() {
    let (_cloud, world) = set_up().await;
    let path = world.node.paths().credentials();
    let mode = || fs::metadata(&path).expect("there").permissions().mode() & 0o7777;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("set");
    assert_eq!(keeper(&world).look().await.expect("looked"), Work::default());
    assert_eq!(mode(), 0o600);
    assert_eq!(world.findings(None).await, []);
}

#[tokio::test]
async fn agent_without_a_tunnel_touches_nothing() {
    let world = World::new();
    assert_eq!(keeper(&world).look().await.expect("looked"), Work::default());
    assert!(!world.node.paths().dir.exists());
    let facts = look::look(world.node.paths(), Some(&world.origin), None, NOW_MS).await;
    assert!(facts.expect("seen").is_none());
}
