//! `tunnel setup`: what is made, taken as it is, corrected and refused.

use std::os::unix::fs::PermissionsExt as _;

use agent::tunnel::{
    api, node,
    settings::Controller,
    setup::{Error, Order},
};
use serde_json::json;

use crate::{
    cloud::{ACCOUNT, Cloud, ZONE, zone},
    world::{NOW_MS, World, host},
};

#[tokio::test]
async fn setup_makes_everything_and_a_second_run_changes_nothing() {
    let (cloud, world) = (Cloud::start().await, World::with_real());
    let (told, done) = world.setup(&cloud, &world.order()).await;
    let done = done.expect("set up");
    assert!(
        done.changes >= 6 && done.ready.is_some_and(|ready| ready.connections == 4),
        "{told:?}"
    );
    assert_eq!(cloud.writes().len(), 2, "one tunnel and one record");
    let (tunnel, records) = (cloud.tunnel(), cloud.records());
    let target = format!("{}.cfargotunnel.com", tunnel["id"].as_str().expect("an id"));
    assert_eq!((tunnel["config_src"].as_str(), records.len()), (Some("local"), 1));
    let record = &records[0];
    assert_eq!(record["content"], target);
    assert_eq!(
        (&record["proxied"], &record["ttl"], &record["name"]),
        (&json!(true), &json!(1), &json!("*.example.com"))
    );
    assert!(
        record["comment"]
            .as_str()
            .is_some_and(|text| text.starts_with("pve-sandbox") && text.len() <= 100)
    );
    let paths = world.node.paths();
    for path in [paths.settings(), paths.config(), paths.credentials()] {
        let mode = std::fs::metadata(&path).expect("there").permissions().mode() & 0o7777;
        assert_eq!(mode, 0o600, "{}", path.display());
    }
    assert_eq!(std::fs::metadata(&paths.dir).expect("there").permissions().mode() & 0o777, 0o700);
    assert_eq!(
        world.systemctl(),
        ["enable --quiet pve-sandbox-tunnel", "restart --no-block pve-sandbox-tunnel"]
    );

    let pid = world.pid();
    let (told, done) = world.setup(&cloud, &world.order()).await;
    assert_eq!(done.expect("set up").changes, 0, "{told:?}");
    assert!(told.iter().all(|line| line.starts_with("ok ")), "{told:?}");
    assert_eq!(cloud.writes(), [""; 0]);
    assert_eq!(
        (world.systemctl(), world.pid()),
        (Vec::<String>::new(), pid),
        "it was not restarted"
    );
}

#[tokio::test]
async fn second_node_joins_the_same_tunnel_with_its_secret() {
    let (cloud, first, second) = (Cloud::start().await, World::new(), World::new());
    first.setup(&cloud, &first.order()).await.1.expect("set up");
    cloud.calls();
    second.setup(&cloud, &second.order()).await.1.expect("joined");
    assert_eq!(cloud.writes(), [""; 0], "nothing new at Cloudflare");
    let read = |world: &World| std::fs::read(world.node.paths().credentials()).expect("read");
    assert_eq!(read(&first), read(&second));
    // Another node was faster: the name is taken between the look and the creation.
    let third = World::new();
    let faster = cloud.tunnel();
    cloud.state().tunnels.clear();
    cloud.state().faster = Some(faster);
    let (told, done) = third.setup(&cloud, &third.order()).await;
    done.expect("joined");
    assert!(told.iter().any(|line| line.contains("made by another node")), "{told:?}");
    assert_eq!(read(&first), read(&third));
}

#[tokio::test]
async fn dry_run_sends_no_write_and_writes_no_file() {
    let (cloud, world) = (Cloud::start().await, World::new());
    let order = Order { dry_run: true, ..world.order() };
    let (told, done) = world.setup(&cloud, &order).await;
    assert!(done.expect("told").changes >= 4, "{told:?}");
    for change in
        ["make the tunnel pve-sandbox-example-com", "*.example.com CNAME", "enable and start"]
    {
        assert!(
            told.iter().any(|line| line.starts_with("would") && line.contains(change)),
            "{change}: {told:?}"
        );
    }
    assert_eq!(cloud.writes(), [""; 0]);
    assert!(!world.node.paths().dir.exists());
    assert_eq!(world.systemctl(), [""; 0]);
    // With everything there but one wrong record, that alone is told.
    world.setup(&cloud, &world.order()).await.1.expect("set up");
    cloud.state().records.get_mut(ZONE).expect("the zone")[0]["proxied"] = json!(false);
    cloud.calls();
    let (told, done) = world.setup(&cloud, &order).await;
    assert_eq!(done.expect("told").changes, 1, "{told:?}");
    assert_eq!(cloud.writes(), [""; 0]);
}

#[tokio::test]
async fn record_of_somebody_else_is_refused_before_anything_is_made() {
    let (cloud, world) = (Cloud::start().await, World::new());
    cloud.add_record(&json!({ "type": "A", "name": "*.example.com", "content": "192.0.2.1", "proxied": true, "ttl": 1, "comment": "shop" }));
    let error = world.setup(&cloud, &world.order()).await.1.expect_err("refused").to_string();
    for word in ["*.example.com is A 192.0.2.1", "shop", "--replace-record"] {
        assert!(error.contains(word), "{word}: {error}");
    }
    assert_eq!(cloud.writes(), [""; 0]);
    let replace = Order { replace_record: true, ..world.order() };
    let (told, done) = world.setup(&cloud, &replace).await;
    done.expect("replaced");
    assert!(told.iter().any(|line| line.contains("delete the DNS record")), "{told:?}");
    let records = cloud.records();
    assert_eq!((records.len(), &records[0]["type"]), (1, &json!("CNAME")));
}

#[tokio::test]
async fn our_record_that_leads_elsewhere_is_corrected() {
    let (cloud, world) = (Cloud::start().await, World::new());
    cloud.add_record(&json!({
        "type": "CNAME", "name": "*.example.com", "content": "00000000-a4ef-4643-bbbc-4a0ed4fc8415.cfargotunnel.com",
        "proxied": true, "ttl": 1, "comment": "pve-sandbox: leads to the tunnel before",
    }));
    let (told, done) = world.setup(&cloud, &world.order()).await;
    done.expect("corrected");
    assert!(told.iter().any(|line| line.contains("another tunnel")), "{told:?}");
    let target = world.settings().tunnel.target();
    assert_eq!(cloud.records()[0]["content"], target);
}

#[tokio::test]
async fn tunnel_of_the_dashboard_is_refused() {
    let (cloud, world) = (Cloud::start().await, World::new());
    cloud.add_tunnel("pve-sandbox-example-com", "cloudflare");
    let error = world.setup(&cloud, &world.order()).await.1.expect_err("refused");
    assert!(matches!(error, Error::Remote(_)), "{error}");
    assert_eq!(cloud.writes(), [""; 0]);
}

#[tokio::test]
async fn longest_suffix_of_the_domain_is_its_zone() {
    let (cloud, mut world) = (Cloud::start().await, World::new());
    let deeper = "023e105f4ecef8ad9ca31a8372d0c354";
    cloud.state().zones.push(zone(deeper, "dev.example.com"));
    world.origin.domain = host("sbx.dev.example.com");
    let order = Order { start: false, ..world.order() };
    let (told, done) = world.setup(&cloud, &order).await;
    done.expect("set up");
    assert!(cloud.state().records.contains_key(deeper), "the record is in the deeper zone");
    // Two labels below a zone no free certificate reaches.
    assert!(
        told.iter().any(|line| line.starts_with("note") && line.contains("advanced certificate")),
        "{told:?}"
    );
    let looked: Vec<_> = cloud.calls().into_iter().filter(|call| call == "GET /zones").collect();
    assert_eq!(looked.len(), 2, "its own name first, then the next");

    world.origin.domain = host("example.org");
    let error = world.setup(&cloud, &world.order()).await.1.expect_err("no zone").to_string();
    assert!(
        error.contains("sees no zone of example.org") && error.contains("Zone > Zone > Read"),
        "{error}"
    );
    let order = Order { zone: Some(ZONE.parse().expect("an id")), ..world.order() };
    let error = world.setup(&cloud, &order).await.1.expect_err("another's zone");
    assert!(matches!(error, Error::OtherZone { .. }), "{error}");
}

#[tokio::test]
async fn lists_are_read_to_their_last_page() {
    let (cloud, world) = (Cloud::start().await, World::new());
    cloud.state().page_max = 1;
    // Records of the same name that are in nobody's way fill the first pages.
    for text in ["one", "two", "three"] {
        cloud.add_record(
            &json!({ "type": "TXT", "name": "*.example.com", "content": text, "ttl": 1 }),
        );
    }
    cloud.add_record(&json!({ "type": "A", "name": "*.example.com", "content": "192.0.2.1", "proxied": false, "ttl": 1 }));
    let error =
        world.setup(&cloud, &world.order()).await.1.expect_err("the last one is in the way");
    assert!(matches!(error, Error::Taken(_)), "{error}");
}

#[tokio::test]
async fn too_many_calls_wait_as_long_as_they_are_told_within_a_bound() {
    let (cloud, world) = (Cloud::start().await, World::new());
    cloud.state().busy.extend(["1", "0"]);
    let order = Order { start: false, ..world.order() };
    let begun = tokio::time::Instant::now();
    world.setup(&cloud, &order).await.1.expect("set up after a wait");
    assert!(begun.elapsed() >= std::time::Duration::from_secs(1));
    cloud.state().busy.push_back("3600");
    let error = world.setup(&cloud, &order).await.1.expect_err("too long").to_string();
    assert!(error.contains("try again in 3600 s"), "{error}");
    // A time that far away cannot be counted.
    cloud.state().busy.push_back("18446744073709551615");
    let error = world.setup(&cloud, &order).await.1.expect_err("too long").to_string();
    assert!(error.contains("try again in 18446744073709551615 s"), "{error}");
}

#[tokio::test]
async fn zone_among_several_of_one_name_is_chosen_or_asked_for() {
    const ELSEWHERE: &str = "023e105f4ecef8ad9ca31a8372d0c354";
    const ANOTHER: &str = "699d98642c564d2e855e9661899b7253";
    let (cloud, world) = (Cloud::start().await, World::new());
    let mut moved = zone(ELSEWHERE, "example.com");
    moved["account"]["id"] = json!(ANOTHER);
    moved["status"] = json!("moved");
    cloud.state().zones.insert(0, moved);
    let order = |world: &World| Order { start: false, ..world.order() };
    let (told, done) = world.setup(&cloud, &order(&world)).await;
    done.expect("the active one");
    assert_eq!(String::from(world.settings().zone), ZONE);
    assert!(!told.iter().any(|line| line.contains("name servers")), "{told:?}");

    // Both are as good now: the earlier one stays, and a node without one asks.
    cloud.state().zones[0]["status"] = json!("active");
    cloud.calls();
    assert_eq!(world.setup(&cloud, &order(&world)).await.1.expect("as before").changes, 0);
    let other = World::new();
    let error = other.setup(&cloud, &order(&other)).await.1.expect_err("either").to_string();
    for word in [ZONE, ELSEWHERE, ACCOUNT, ANOTHER, "--zone-id"] {
        assert!(error.contains(word), "{word}: {error}");
    }
    assert_eq!(cloud.writes(), [""; 0]);
    let account = Some(ACCOUNT.parse().expect("an id"));
    other.setup(&cloud, &Order { account, ..order(&other) }).await.1.expect("the account's");
    assert_eq!(String::from(other.settings().zone), ZONE);
    let third = World::new();
    let given = Some(ZONE.parse().expect("an id"));
    third.setup(&cloud, &Order { zone: given, ..order(&third) }).await.1.expect("the given one");
}

#[tokio::test]
async fn controller_is_published_before_the_wildcard_and_stays_in_a_later_run() {
    let (cloud, world) = (Cloud::start().await, World::with_real());
    let controller = Controller {
        host: host("api.example.com"),
        address: "192.0.2.11:7443".parse().expect("an address"),
    };
    let order = Order { controller: Some(controller), start: false, ..world.order() };
    world.setup(&cloud, &order).await.1.expect("set up");
    let names: Vec<_> = cloud.records().iter().map(|record| record["name"].clone()).collect();
    assert_eq!(names, [json!("*.example.com"), json!("api.example.com")]);
    let text = std::fs::read_to_string(world.node.paths().config()).expect("read");
    let at = |part: &str| text.find(part).unwrap_or_else(|| panic!("{part} in {text}"));
    assert!(
        at("api.example.com") < at("*.example.com") && text.contains("https://192.0.2.11:7443")
    );
    let again = Order { start: false, ..world.order() };
    assert_eq!(world.setup(&cloud, &again).await.1.expect("right").changes, 0);
    // A host elsewhere has no record in this zone.
    let elsewhere = Controller {
        host: host("api.example.org"),
        address: "192.0.2.11:7443".parse().expect("an address"),
    };
    let order = Order { controller: Some(elsewhere), ..again };
    let error = world.setup(&cloud, &order).await.1.expect_err("another zone");
    assert!(matches!(error, Error::ControllerZone { .. }), "{error}");
    let way_out = "--controller-host api.example.com --controller-address 192.0.2.11:7443";
    assert!(error.to_string().contains(way_out), "{error}");
}

#[tokio::test]
async fn secret_that_was_renewed_is_fetched_and_the_connector_restarted() {
    let (cloud, world) = (Cloud::start().await, World::new());
    world.setup(&cloud, &world.order()).await.1.expect("set up");
    world.systemctl();
    std::fs::write(world.node.paths().credentials(), "{}").expect("written");
    let (told, done) = world.setup(&cloud, &world.order()).await;
    assert_eq!(done.expect("mended").changes, 2, "{told:?}");
    assert_eq!(world.systemctl(), ["restart --no-block pve-sandbox-tunnel"]);
}

#[tokio::test]
async fn outdated_cloudflared_is_told() {
    let (cloud, world) = (Cloud::start().await, World::new());
    let now_ms = NOW_MS + 365 * 24 * 3_600_000;
    let order = Order { start: false, now_ms, ..world.order() };
    let (told, done) = world.setup(&cloud, &order).await;
    done.expect("set up");
    let first = told.first().expect("a line");
    assert!(first.starts_with("note") && first.contains("15 months old"), "{first}");
    assert!(first.contains("apt-get install cloudflared"), "{first}");
}

#[tokio::test]
async fn node_without_cloudflared_is_told_how_to_install_it() {
    let (cloud, world) = (Cloud::start().await, World::new());
    let mut paths = world.node.paths().clone();
    paths.cloudflared = world.file("no-cloudflared");
    let runner = agent::run::Runner::new(world.file("other"), "/proc".into(), |_| false, 1);
    let node = node::Node::new(paths, runner.expect("a runner"));
    let (api, order) = (crate::world::api(&cloud), world.order());
    let done = agent::tunnel::setup::run(&order, &world.origin, &api, &node, &mut |_| {}).await;
    let error = done.expect_err("missing");
    assert!(matches!(error, Error::Node(node::Error::Missing(_))), "{error}");
    assert!(error.to_string().contains("apt-get install cloudflared"), "{error}");
    assert_eq!(cloud.calls(), [""; 0], "nothing was asked before");
}

#[tokio::test]
async fn unit_that_the_agent_would_start_is_told_where_nothing_is_to_be_started() {
    let (cloud, world) = (Cloud::start().await, World::new());
    let order = Order { start: false, ..world.order() };
    let is_told = |told: &[String]| {
        let line = told.iter().find(|line| line.contains("systemctl disable pve-sandbox-tunnel"));
        line.is_some_and(|line| line.starts_with("note"))
    };
    let (told, done) = world.setup(&cloud, &order).await;
    done.expect("set up");
    assert!(!is_told(&told), "it is not enabled: {told:?}");
    world.setup(&cloud, &world.order()).await.1.expect("started");
    assert!(!is_told(&world.setup(&cloud, &order).await.0), "it runs");
    world.node.systemctl(&["stop", "pve-sandbox-tunnel"]).await.expect("stopped");
    let (told, _) = world.setup(&cloud, &order).await;
    assert!(is_told(&told), "{told:?}");
}

#[tokio::test]
async fn ids_that_are_given_are_not_looked_up() {
    let (cloud, world) = (Cloud::start().await, World::new());
    cloud.state().may.zones = false;
    let order = Order {
        zone: Some(ZONE.parse().expect("an id")),
        account: Some(ACCOUNT.parse().expect("an id")),
        start: false,
        ..world.order()
    };
    world.setup(&cloud, &order).await.1.expect("set up without Zone Read");
    assert_eq!(world.settings().zone_name, None);
    let error =
        world.setup(&cloud, &Order { account: None, ..order }).await.1.expect_err("no account");
    assert!(matches!(error, Error::Api(api::Error::Lacks { .. })), "{error}");
}
