//! A node that is set up again for another domain, zone or tunnel: what stays at Cloudflare is told, and `teardown
//! --everything` removes it.

use agent::tunnel::{
    api,
    settings::Controller,
    setup::Order,
    teardown::{self, Error},
};
use serde_json::json;

use crate::{
    cloud::{Cloud, Fault, ZONE, connector, zone},
    teardown::{DO, tear_down},
    world::{World, host, set_up},
};

/// Zone of the new domain.
const ELSEWHERE: &str = "023e105f4ecef8ad9ca31a8372d0c354";
/// Zone of a third domain.
const THIRD: &str = "023e105f4ecef8ad9ca31a8372d0c355";
const OLD: &str = "the tunnel pve-sandbox-example-com (";

/// A node that is set up for example.com, and whose domain is now example.org.
async fn about_to_move() -> (Cloud, World) {
    let (cloud, mut world) = set_up().await;
    cloud.state().zones.push(zone(ELSEWHERE, "example.org"));
    world.origin.domain = host("example.org");
    cloud.calls();
    (cloud, world)
}

/// A node that was set up for example.com first, and then for example.org.
async fn moved() -> (Cloud, World) {
    let (cloud, world) = about_to_move().await;
    world.setup(&cloud, &world.order()).await.1.expect("set up");
    (cloud, world)
}

/// Returns what is told of earlier setups.
fn notes(told: &[String]) -> Vec<&str> {
    let lines = told.iter().map(String::as_str);
    lines.filter(|line| line.starts_with("note   an earlier setup")).collect()
}

fn tunnels(cloud: &Cloud) -> Vec<String> {
    let state = cloud.state();
    state.tunnels.iter().map(|one| one["name"].as_str().unwrap_or_default().to_owned()).collect()
}

/// Returns why an earlier setup's part was not removed.
fn reason(error: &Error) -> &Error {
    let Error::Earlier { source, .. } = error else { panic!("{error}") };
    source
}

/// Number of DNS records in all zones.
fn records(cloud: &Cloud) -> usize {
    cloud.state().records.values().map(Vec::len).sum()
}

#[tokio::test]
async fn new_domain_says_what_stays_and_a_teardown_of_everything_removes_both() {
    let (cloud, world) = about_to_move().await;
    let before = world.settings();
    let planned = Order { dry_run: true, ..world.order() };
    for order in [planned, world.order()] {
        let (told, done) = world.setup(&cloud, &order).await;
        done.expect("set up");
        let [note] = notes(&told)[..] else { panic!("{told:?}") };
        for word in [OLD, "the DNS record *.example.com", "tunnel teardown --everything"] {
            assert!(note.contains(word), "{word}: {note}");
        }
        if order.dry_run {
            assert_eq!((cloud.writes(), world.settings()), (vec![], before.clone()));
        }
    }
    assert_eq!(world.settings().earlier, [before.footprint()]);
    assert_eq!((tunnels(&cloud).len(), records(&cloud)), (2, 2));
    // Again: it is there still.
    let (told, done) = world.setup(&cloud, &world.order()).await;
    assert_eq!((done.expect("right").changes, notes(&told).len()), (0, 1), "{told:?}");

    let dry = teardown::Order { dry_run: true, ..DO };
    let (told, done) = tear_down(&world, Some(&cloud), dry).await;
    done.expect("told");
    let deletions = told.iter().filter(|line| line.contains("delete the")).count();
    assert_eq!((deletions, tunnels(&cloud).len()), (4, 2), "{told:?}");
    let (told, done) = tear_down(&world, Some(&cloud), DO).await;
    done.expect("gone");
    assert_eq!((tunnels(&cloud).len(), records(&cloud)), (0, 0), "{told:?}");
    assert!(!world.node.paths().dir.exists());
}

#[tokio::test]
async fn what_somebody_has_removed_since_is_told_and_kept_no_more() {
    let (cloud, world) = moved().await;
    cloud.state().tunnels.retain(|one| one["name"] != "pve-sandbox-example-com");
    let (told, done) = world.setup(&cloud, &world.order()).await;
    done.expect("set up");
    let [note] = notes(&told)[..] else { panic!("{told:?}") };
    assert!(note.contains("the DNS record *.example.com") && !note.contains(OLD), "{note}");
    cloud.state().records.remove(ZONE);
    let (told, done) = world.setup(&cloud, &world.order()).await;
    done.expect("set up");
    assert!(notes(&told).is_empty() && world.settings().earlier.is_empty(), "{told:?}");
}

#[tokio::test]
async fn what_cannot_be_looked_at_is_kept() {
    let (cloud, world) = moved().await;
    let old = world.settings().earlier[0].tunnel.to_string();
    let is_question = |call: &String| call.starts_with("GET ") && call.ends_with(&old);
    let at = cloud.calls().iter().position(is_question).expect("it was asked for");

    let (cloud, world) = about_to_move().await;
    cloud.state().fault = Some((at, Fault::Refused));
    let (told, done) = world.setup(&cloud, &world.order()).await;
    done.expect("set up");
    let [note] = notes(&told)[..] else { panic!("{told:?}") };
    assert!(note.contains("is not known") && cloud.state().fault.is_none(), "{note}");
    assert_eq!(world.settings().earlier.len(), 1);
}

#[tokio::test]
async fn node_that_moves_back_keeps_the_place_between() {
    let (cloud, mut world) = moved().await;
    let between = world.settings().footprint();
    world.origin.domain = host("example.com");
    let (told, done) = world.setup(&cloud, &world.order()).await;
    done.expect("set up");
    assert_eq!(world.settings().earlier, [between], "{told:?}");
    let [note] = notes(&told)[..] else { panic!("{told:?}") };
    assert!(note.contains("pve-sandbox-example-org"), "{note}");
    tear_down(&world, Some(&cloud), DO).await.1.expect("gone");
    assert_eq!((tunnels(&cloud).len(), records(&cloud)), (0, 0));
}

#[tokio::test]
async fn old_record_of_the_same_tunnel_is_told() {
    let (cloud, mut world) = set_up().await;
    let name = world.order().name;
    world.origin.domain = host("sbx.example.com");
    let order = Order { name, ..world.order() };
    let (told, done) = world.setup(&cloud, &order).await;
    done.expect("set up");
    let [note] = notes(&told)[..] else { panic!("{told:?}") };
    assert!(note.contains("the DNS record *.example.com") && !note.contains(OLD), "{note}");
    // The tunnel and the zone are those of now.
    assert_eq!((world.settings().earlier, records(&cloud)), (vec![], 2));
    tear_down(&world, Some(&cloud), DO).await.1.expect("gone");
    assert_eq!((tunnels(&cloud).len(), records(&cloud)), (0, 0));
}

#[tokio::test]
async fn other_nodes_are_not_cut_off_from_an_earlier_tunnel_unless_forced() {
    let (cloud, world) = moved().await;
    let old = world.settings().earlier[0].tunnel.to_string();
    cloud.state().connectors.insert(old, vec![connector("other-node")]);
    let error = tear_down(&world, Some(&cloud), DO).await.1.expect_err("refused");
    assert!(matches!(reason(&error), Error::Connected(_)), "{error}");
    assert!(error.to_string().contains("pve-sandbox-example-com (other-node"), "{error}");
    assert_eq!(tunnels(&cloud), ["pve-sandbox-example-com"], "that of now is gone");
    assert_eq!(world.settings().earlier.len(), 1, "a repeated call finds the other one");
    let forced = teardown::Order { force: true, ..DO };
    tear_down(&world, Some(&cloud), forced).await.1.expect("forced");
    assert_eq!((tunnels(&cloud).len(), records(&cloud)), (0, 0));
}

#[tokio::test]
async fn earlier_setup_that_cannot_be_removed_does_not_keep_the_others() {
    let (cloud, mut world) = moved().await;
    cloud.state().zones.push(zone(THIRD, "example.net"));
    world.origin.domain = host("example.net");
    world.setup(&cloud, &world.order()).await.1.expect("set up");
    let earlier = world.settings().earlier;
    let names: Vec<_> = earlier.iter().map(|one| one.name.as_str()).collect();
    assert_eq!(names, ["pve-sandbox-example-com", "pve-sandbox-example-org"]);

    cloud.state().hidden_zone = Some(ZONE);
    let error = tear_down(&world, Some(&cloud), DO).await.1.expect_err("refused");
    assert!(matches!(reason(&error), Error::Api(api::Error::Lacks { .. })), "{error}");
    let text = error.to_string();
    assert!(text.contains(OLD) && !text.contains("example-org"), "{text}");
    assert!(text.contains("`tunnel teardown` without --everything removes"), "{text}");
    assert_eq!(tunnels(&cloud), ["pve-sandbox-example-com"]);
    assert_eq!(records(&cloud), 1);
    assert_eq!(world.settings().earlier, earlier, "a repeated call looks there again");

    tear_down(&world, None, DO).await.1.expect("as the error says");
    assert!(!world.node.paths().dir.exists());
}

#[tokio::test]
async fn node_that_leaves_names_what_nobody_will_find_any_more() {
    let (cloud, world) = moved().await;
    let (told, done) = tear_down(&world, None, DO).await;
    done.expect("left");
    let [note] = notes(&told)[..] else { panic!("{told:?}") };
    assert!(note.contains(OLD) && note.contains("--everything"), "{note}");
    assert_eq!(tunnels(&cloud).len(), 2);
}

#[tokio::test]
async fn controller_of_the_old_zone_is_refused_with_the_way_out() {
    let (cloud, world) = about_to_move().await;
    let controller = |name: &str| Controller {
        host: host(name),
        address: "192.0.2.11:7443".parse().expect("an address"),
    };
    let mut before = world.settings();
    before.controller = Some(controller("api.example.com"));
    before.write(&world.node.paths().settings()).expect("written");
    let told = world.setup(&cloud, &world.order()).await.1.expect_err("refused").to_string();
    let way_out = "--controller-host api.example.org --controller-address 192.0.2.11:7443";
    assert!(told.contains(way_out), "{told}");
    assert_eq!(cloud.writes(), [""; 0]);
    let order = Order { controller: Some(controller("api.example.org")), ..world.order() };
    world.setup(&cloud, &order).await.1.expect("set up");
    let state = cloud.state();
    let names: Vec<_> = state.records[ELSEWHERE].iter().map(|one| one["name"].clone()).collect();
    assert_eq!(names, [json!("*.example.org"), json!("api.example.org")]);
}
