//! `tunnel setup` on several nodes: each needs the rule of the controller, and none takes a name from a tunnel that
//! others are connected to.

use agent::tunnel::{
    node,
    settings::Controller,
    setup::{Error, Order},
};
use serde_json::json;

use crate::{
    cloud::{Cloud, Fault, connector},
    world::{World, host, only},
};

fn controller() -> Controller {
    Controller {
        host: host("api.example.com"),
        address: "192.0.2.11:7443".parse().expect("an address"),
    }
}

#[tokio::test]
async fn controller_that_one_of_two_nodes_publishes_is_found_on_the_other() {
    let (cloud, first, second) = (Cloud::start().await, World::new(), World::new());
    for world in [&first, &second] {
        world.setup(&cloud, &world.order()).await.1.expect("set up");
    }
    assert_eq!(second.findings(Some(&cloud)).await, []);
    let tunnel = first.settings().tunnel.to_string();
    cloud.state().connectors.insert(tunnel, vec![connector("second")]);
    let publish = |world: &World| Order { controller: Some(controller()), ..world.order() };
    let (told, done) = first.setup(&cloud, &publish(&first)).await;
    done.expect("published");
    let is_told = |line: &String| {
        line.starts_with("note") && line.contains("each other node") && line.contains("192.0.2.9")
    };
    assert!(told.iter().any(is_told), "{told:?}");

    assert_eq!(first.findings(Some(&cloud)).await, []);
    let remedy = "--controller-host api.example.com --controller-address";
    only(&second.findings(Some(&cloud)).await, "tunnel-record", remedy);
    second.setup(&cloud, &publish(&second)).await.1.expect("published here, too");
    assert_eq!(second.findings(Some(&cloud)).await, []);
}

#[tokio::test]
async fn other_nodes_that_cannot_be_looked_up_do_not_keep_this_one_from_its_start() {
    let publish = |world: &World| Order { controller: Some(controller()), ..world.order() };
    let (cloud, world) = (Cloud::start().await, World::new());
    world.setup(&cloud, &publish(&world)).await.1.expect("set up");
    let requests = cloud.calls().len();

    let (cloud, world) = (Cloud::start().await, World::new());
    cloud.state().fault = Some((requests - 1, Fault::Refused));
    let (told, done) = world.setup(&cloud, &publish(&world)).await;
    assert!(done.expect("set up").ready.is_some(), "{told:?}");
    let is_told = |line: &String| {
        line.starts_with("note") && line.contains("each other node") && line.contains("not known")
    };
    assert!(told.iter().any(is_told) && cloud.state().fault.is_none(), "{told:?}");
    assert_eq!(world.findings(None).await, []);
}

#[tokio::test]
async fn later_node_does_not_join_without_the_rule_of_the_controller() {
    let (cloud, first, later) = (Cloud::start().await, World::new(), World::new());
    let publish = |world: &World| Order { controller: Some(controller()), ..world.order() };
    first.setup(&cloud, &publish(&first)).await.1.expect("published");
    cloud.calls();
    let error = later.setup(&cloud, &later.order()).await.1.expect_err("refused");
    assert!(matches!(&error, Error::Unpublished(name) if name == "api.example.com"), "{error}");
    let told = error.to_string();
    assert!(told.contains("--controller-host api.example.com --controller-address"), "{told}");
    assert!(cloud.writes().is_empty() && !later.node.paths().dir.exists(), "nothing was changed");
    later.setup(&cloud, &publish(&later)).await.1.expect("joined");
    // The first one keeps its rule without a word.
    assert_eq!(first.setup(&cloud, &first.order()).await.1.expect("right").changes, 0);
}

#[tokio::test]
async fn name_is_not_taken_from_a_tunnel_that_other_nodes_are_connected_to() {
    let (cloud, first, second) = (Cloud::start().await, World::new(), World::new());
    let office = |world: &World| Order { name: "office".into(), ..world.order() };
    first.setup(&cloud, &office(&first)).await.1.expect("set up");
    let target = first.settings().tunnel.target();
    let tunnel = first.settings().tunnel.to_string();
    cloud.state().connectors.insert(tunnel, vec![connector("first")]);
    cloud.calls();
    let (_, done) = second.setup(&cloud, &second.order()).await;
    let told = done.expect_err("refused").to_string();
    for word in ["*.example.com leads to the tunnel office", "--name office", "--replace-record"] {
        assert!(told.contains(word), "{word}: {told}");
    }
    assert_eq!(cloud.writes(), [""; 0]);
    assert_eq!(cloud.records()[0]["content"], target);

    second.setup(&cloud, &office(&second)).await.1.expect("joined");
    assert_eq!(cloud.writes(), [""; 0]);
    // An operator who says so gets it.
    let third = World::new();
    let replace = Order { replace_record: true, ..third.order() };
    third.setup(&cloud, &replace).await.1.expect("replaced");
    assert_eq!(cloud.records()[0]["content"], third.settings().tunnel.target());
}

#[tokio::test]
async fn name_is_taken_from_a_tunnel_that_only_this_node_or_nobody_is_connected_to() {
    let (cloud, world) = (Cloud::start().await, World::new());
    let named = |name: &str| Order { name: name.into(), ..world.order() };
    world.setup(&cloud, &named("office")).await.1.expect("set up");
    let own = node::ready(world.metrics).await.expect("it answers").connector;
    let tunnel = world.settings().tunnel.to_string();
    cloud.state().connectors.insert(tunnel, vec![connector(&own)]);
    world.setup(&cloud, &named("home")).await.1.expect("its own");
    let other = World::new();
    other.setup(&cloud, &other.order()).await.1.expect("nobody's");
    assert_eq!(cloud.records()[0]["content"], json!(other.settings().tunnel.target()));
    // A record that is wrong otherwise is corrected, whoever is connected to the same tunnel.
    let tunnel = other.settings().tunnel.to_string();
    cloud.state().connectors.insert(tunnel, vec![connector("another")]);
    cloud.state().records.values_mut().flatten().for_each(|one| one["proxied"] = json!(false));
    other.setup(&cloud, &other.order()).await.1.expect("corrected");
    assert_eq!(cloud.records()[0]["proxied"], json!(true));
}
