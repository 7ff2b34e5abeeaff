//! `tunnel setup` that fails on its way: a repeated call goes on where it ended, and makes nothing twice.

use std::fs;

use agent::tunnel::{
    ids::TunnelId,
    node, record,
    settings::Controller,
    setup::{Error, Order},
};
use serde_json::json;

use crate::{
    cloud::{Cloud, Fault},
    world::{REFUSAL, World, host, set_up},
};

/// Most requests of one setup.
const REQUESTS_MAX: usize = 50;

/// Sets up again after a failure, and checks that all is there once.
async fn goes_on(cloud: &Cloud, world: &World, order: &Order, records: usize) {
    let (told, done) = world.setup(cloud, order).await;
    done.unwrap_or_else(|error| panic!("{error}\n{told:?}"));
    assert_eq!((cloud.records().len(), cloud.state().tunnels.len()), (records, 1), "{told:?}");
    let target = world.settings().tunnel.target();
    assert!(cloud.records().iter().all(|record| record["content"] == target), "{told:?}");
    let (told, done) = world.setup(cloud, order).await;
    assert_eq!(done.expect("right").changes, 0, "{told:?}");
}

#[tokio::test]
async fn setup_goes_on_after_a_failure_of_any_request() {
    let controller = Controller {
        host: host("api.example.com"),
        address: "192.0.2.11:7443".parse().expect("an address"),
    };
    for fault in [Fault::Refused, Fault::Lost] {
        let mut failed = 0;
        for at in 0..REQUESTS_MAX {
            let (cloud, world) = (Cloud::start().await, World::new());
            let controller = Some(controller.clone());
            let order = Order { controller, start: false, ..world.order() };
            cloud.state().fault = Some((at, fault));
            let (told, done) = world.setup(&cloud, &order).await;
            if cloud.state().fault.take().is_some() {
                done.unwrap_or_else(|error| panic!("after {at} requests: {error}\n{told:?}"));
                break;
            }
            // The last one is only for a note on other nodes.
            let is_told = told.iter().any(|line| line.contains("not known"));
            assert_eq!(done.is_ok(), is_told, "after {at} requests: {told:?}");
            failed += 1;
            goes_on(&cloud, &world, &order, 2).await;
        }
        // A zone, a tunnel, two names; a tunnel and two records to make.
        assert!((7..REQUESTS_MAX).contains(&failed), "{failed} requests");
    }
}

#[tokio::test]
async fn node_that_joins_goes_on_after_a_failure_of_any_request() {
    let mut failed = 0;
    for at in 0..REQUESTS_MAX {
        let (cloud, first, world) = (Cloud::start().await, World::new(), World::new());
        let order = |world: &World| Order { start: false, ..world.order() };
        first.setup(&cloud, &order(&first)).await.1.expect("set up");
        cloud.state().fault = Some((at, Fault::Refused));
        let (_, done) = world.setup(&cloud, &order(&world)).await;
        if cloud.state().fault.take().is_some() {
            done.expect("no request failed");
            break;
        }
        done.expect_err("a failed request is told");
        failed += 1;
        goes_on(&cloud, &world, &order(&world), 1).await;
    }
    // A zone, a tunnel, its names, a name, the secret.
    assert!((5..REQUESTS_MAX).contains(&failed), "{failed} requests");
}

#[tokio::test]
async fn setup_goes_on_after_a_failure_of_a_file() {
    for name in ["tunnel", "tunnel/credentials.json", "tunnel/config.yml"] {
        let (cloud, world) = (Cloud::start().await, World::new());
        let order = Order { start: false, ..world.order() };
        // What cannot be read, nor be replaced: a directory for a file, and a file for the directory.
        let path = world.file(name);
        if name == "tunnel" {
            fs::write(&path, "").expect("written");
        } else {
            fs::create_dir_all(&path).expect("made");
        }
        let error = world.setup(&cloud, &order).await.1.expect_err(name);
        assert!(matches!(error, Error::Node(node::Error::File(..))), "{name}: {error}");
        let gone = if name == "tunnel" { fs::remove_file(&path) } else { fs::remove_dir(&path) };
        gone.expect("removed");
        goes_on(&cloud, &world, &order, 1).await;
    }
}

#[tokio::test]
async fn setup_goes_on_after_a_failure_of_systemctl() {
    for verb in ["enable", "restart"] {
        let (cloud, world) = (Cloud::start().await, World::new());
        fs::write(world.file("fails"), verb).expect("written");
        let error = world.setup(&cloud, &world.order()).await.1.expect_err(verb);
        assert!(matches!(error, Error::Node(node::Error::Failed { .. })), "{verb}: {error}");
        assert_eq!(world.pid(), None);
        fs::remove_file(world.file("fails")).expect("removed");
        goes_on(&cloud, &world, &world.order(), 1).await;
        let ready = node::ready(world.metrics).await;
        assert!(ready.is_some_and(|ready| ready.connections > 0), "{verb}");
    }
}

#[tokio::test]
async fn restart_that_failed_is_made_up_for() {
    let restart = "restart --no-block pve-sandbox-tunnel";
    for name in ["config.yml", "credentials.json"] {
        let (cloud, world) = set_up().await;
        // As if the connector was started before the files were written.
        let given = world.node.paths().given.join(name);
        let text = fs::read_to_string(&given).expect("read");
        let before =
            text.replace("8480", "8006").replace("\"TunnelSecret\":\"", "\"TunnelSecret\":\"b2xk");
        assert_ne!(before, text);
        fs::write(&given, before).expect("written");
        fs::write(world.file("fails"), "restart").expect("written");
        let error = world.setup(&cloud, &world.order()).await.1.expect_err(name);
        assert!(matches!(error, Error::Node(node::Error::Failed { .. })), "{name}: {error}");
        assert_eq!(world.systemctl(), [restart]);
        fs::remove_file(world.file("fails")).expect("removed");
        goes_on(&cloud, &world, &world.order(), 1).await;
        assert_eq!(world.systemctl(), [restart], "{name}: once");
    }
}

#[tokio::test]
async fn configuration_that_cloudflared_refuses_is_not_set_up() {
    let (cloud, world) = (Cloud::start().await, World::with_checker());
    fs::write(world.file("refuses"), "").expect("written");
    let error = world.setup(&cloud, &world.order()).await.1.expect_err("refused");
    assert!(matches!(error, Error::Node(node::Error::Invalid(_))), "{error}");
    assert!(error.to_string().contains(REFUSAL), "{error}");
    let paths = world.node.paths();
    assert!(!paths.config().exists() && !paths.settings().exists(), "neither is written");
    assert_eq!((world.systemctl(), world.pid()), (vec![], None), "nothing was started");
    // The program that checks is not what connects here, as on a machine with the real one.
    fs::remove_file(world.file("refuses")).expect("removed");
    goes_on(&cloud, &world, &world.order(), 1).await;
    assert!(node::ready(world.metrics).await.is_some_and(|ready| ready.connections == 4));
}

#[tokio::test]
async fn record_that_another_node_makes_in_between_is_as_good() {
    let (cloud, world) = (Cloud::start().await, World::new());
    let order = Order { start: false, ..world.order() };
    let id = cloud.add_tunnel(&order.name, "local");
    let tunnel: TunnelId = id.parse().expect("an id");
    let rival = |content: &str| {
        let wanted = record::wanted("*.example.com", &tunnel, &order.name);
        let mut rival = serde_json::to_value(wanted).expect("JSON");
        rival["id"] = json!("023e105f4ecef8ad9ca31a8372d0c3aa");
        rival["content"] = json!(content);
        Some(rival)
    };
    cloud.state().rival = rival(&tunnel.target());
    goes_on(&cloud, &world, &order, 1).await;
    assert!(cloud.calls().iter().any(|call| call.starts_with("POST ")), "it was tried");

    // One that leads elsewhere is not.
    cloud.state().records.clear();
    let elsewhere = "00000000-a4ef-4643-bbbc-4a0ed4fc8415.cfargotunnel.com";
    cloud.state().rival = rival(elsewhere);
    let error = world.setup(&cloud, &order).await.1.expect_err("taken");
    assert!(matches!(&error, Error::Taken(_)), "{error}");
    assert_eq!(cloud.records()[0]["content"], elsewhere, "it is left alone");
}
