//! `tunnel teardown`: only what carries our mark goes, and no other node is cut off.

use agent::tunnel::teardown::{self, Error, Order};
use serde_json::json;

use crate::{
    cloud::Cloud,
    world::{World, api},
};

const DO: Order = Order { force: false, dry_run: false };

async fn tear_down(
    world: &World,
    cloud: Option<&Cloud>,
    order: Order,
) -> (Vec<String>, Result<(), Error>) {
    let (mut told, api) = (Vec::new(), cloud.map(api));
    let domain = &world.origin.domain;
    let cloud = api.as_ref().map(|api| (api, domain));
    let mut say = |line: &str| told.push(line.to_owned());
    let done = teardown::run(order, cloud, &world.node, &mut say).await;
    (told, done)
}

fn connector(id: &str) -> serde_json::Value {
    json!({
        "id": id, "version": "2026.8.2", "arch": "linux_amd64", "run_at": "2026-11-30T10:00:00Z",
        "conns": [{ "colo_name": "FRA", "origin_ip": "192.0.2.9" }],
    })
}

#[tokio::test]
async fn node_leaves_the_tunnel_and_cloudflare_is_not_asked() {
    let (cloud, world) = (Cloud::start().await, World::new());
    world.setup(&cloud, &world.order()).await.1.expect("set up");
    let (told, done) = tear_down(&world, None, Order { dry_run: true, ..DO }).await;
    done.expect("told");
    assert!(told.iter().all(|line| line.starts_with("would")) && told.len() == 2, "{told:?}");
    assert!(world.node.paths().dir.exists() && world.pid().is_some());
    world.systemctl();
    tear_down(&world, None, DO).await.1.expect("gone");
    assert_eq!(world.systemctl(), ["disable --now --quiet pve-sandbox-tunnel"]);
    assert!(!world.node.paths().dir.exists() && world.pid().is_none());
    assert_eq!((cloud.records().len(), cloud.state().tunnels.len()), (1, 1), "both stay");
    let (told, done) = tear_down(&world, None, DO).await;
    done.expect("again");
    assert_eq!(told, ["this node is no connector of a tunnel"]);
    // What stays is found by the domain.
    tear_down(&world, Some(&cloud), DO).await.1.expect("gone");
    assert_eq!((cloud.records().len(), cloud.state().tunnels.len()), (0, 0));
    tear_down(&world, Some(&cloud), DO).await.1.expect("nothing is left");
}

#[tokio::test]
async fn everything_goes_but_what_carries_no_mark() {
    let (cloud, world) = (Cloud::start().await, World::new());
    cloud.add_record(
        &json!({ "type": "TXT", "name": "*.example.com", "content": "mine", "ttl": 1 }),
    );
    world.setup(&cloud, &world.order()).await.1.expect("set up");
    cloud.state().lingers = 1;
    tear_down(&world, Some(&cloud), DO).await.1.expect("gone");
    let records = cloud.records();
    assert_eq!((records.len(), &records[0]["type"]), (1, &json!("TXT")));
    assert!(cloud.state().tunnels.is_empty() && !world.node.paths().dir.exists());

    // A tunnel with a name of the operator's own stays, and so does a record without our comment.
    let other = World::new();
    let order = agent::tunnel::setup::Order { name: "office".into(), ..other.order() };
    cloud.add_tunnel("office", "local");
    other.setup(&cloud, &order).await.1.expect("set up");
    for record in cloud.state().records.values_mut().flatten() {
        record["comment"] = json!("mine");
    }
    tear_down(&other, Some(&cloud), DO).await.1.expect("gone");
    assert_eq!((cloud.records().len(), cloud.state().tunnels.len()), (2, 1));
}

#[tokio::test]
async fn other_nodes_are_not_cut_off_unless_forced() {
    let (cloud, world) = (Cloud::start().await, World::new());
    world.setup(&cloud, &world.order()).await.1.expect("set up");
    let own = agent::tunnel::node::ready(world.metrics).await.expect("it answers").connector;
    let tunnel = world.settings().tunnel.to_string();
    cloud.state().connectors.insert(tunnel.clone(), vec![connector(&own), connector("other-node")]);
    cloud.calls();
    let error = tear_down(&world, Some(&cloud), DO).await.1.expect_err("refused").to_string();
    assert!(error.contains("other-node from 192.0.2.9") && !error.contains(&own), "{error}");
    assert_eq!(cloud.writes(), [""; 0]);
    assert!(world.pid().is_some(), "nothing was stopped");
    tear_down(&world, Some(&cloud), Order { force: true, ..DO }).await.1.expect("forced");
    assert!(cloud.state().tunnels.is_empty());
}
