//! `tunnel teardown`: only what carries our mark goes, and no other node is cut off.

use agent::tunnel::teardown::{self, Error, Order};
use serde_json::json;

use crate::{
    cloud::{ACCOUNT, Cloud, TOKEN, ZONE, connector},
    documents::Installed,
    world::{World, api, set_up},
};

pub(crate) const DO: Order = Order { force: false, dry_run: false };

pub(crate) async fn tear_down(
    world: &World,
    cloud: Option<&Cloud>,
    order: Order,
) -> (Vec<String>, Result<(), Error>) {
    let (mut told, api) = (Vec::new(), cloud.map(api));
    let domain = Some(&world.origin.domain);
    let cloud =
        api.as_ref().map(|api| teardown::CloudScope { api, domain, zone: None, account: None });
    let mut say = |line: &str| told.push(line.to_owned());
    let done = teardown::run(order, cloud, &world.node, &mut say).await;
    (told, done)
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
    let (told, done) = tear_down(&world, Some(&cloud), DO).await;
    done.expect("nothing is left");
    assert!(
        told.iter().any(|line| line.starts_with("nothing was found at Cloudflare")),
        "{told:?}"
    );
}

#[tokio::test]
async fn node_that_has_left_finds_a_tunnel_of_another_name_by_its_record() {
    let (cloud, world) = (Cloud::start().await, World::new());
    let order = agent::tunnel::setup::Order { name: "office".into(), ..world.order() };
    world.setup(&cloud, &order).await.1.expect("set up");
    let tunnel = world.settings().tunnel.to_string();
    tear_down(&world, None, DO).await.1.expect("left");
    // Other nodes are seen by it, too.
    cloud.state().connectors.insert(tunnel.clone(), vec![connector("other-node")]);
    let error = tear_down(&world, Some(&cloud), DO).await.1.expect_err("refused");
    assert!(matches!(error, Error::Connected(_)), "{error}");
    cloud.state().connectors.clear();
    let (told, done) = tear_down(&world, Some(&cloud), DO).await;
    done.expect("gone");
    assert!(cloud.records().is_empty(), "{told:?}");
    // Its name has no mark: it may have been there before.
    assert_eq!(cloud.state().tunnels.len(), 1);
    assert!(told.iter().any(|line| line.contains("the tunnel office stays")), "{told:?}");

    // One of our names that is not the domain's goes, too.
    let order = agent::tunnel::setup::Order { name: "pve-sandbox-2".into(), ..world.order() };
    world.setup(&cloud, &order).await.1.expect("set up");
    tear_down(&world, None, DO).await.1.expect("left");
    tear_down(&world, Some(&cloud), DO).await.1.expect("gone");
    let names: Vec<_> = cloud.state().tunnels.iter().map(|one| one["name"].clone()).collect();
    assert_eq!((cloud.records().len(), names), (0, vec![json!("office")]));
}

#[tokio::test]
async fn record_is_removed_whose_tunnel_is_gone_already() {
    let (cloud, world) = (Cloud::start().await, World::new());
    world.setup(&cloud, &world.order()).await.1.expect("set up");
    tear_down(&world, None, DO).await.1.expect("left");
    cloud.state().tunnels.clear();
    tear_down(&world, Some(&cloud), DO).await.1.expect("gone");
    assert!(cloud.records().is_empty());
}

/// Sets up on a node as its operator does.
const SETUP: &str =
    "pve-sandbox-agent tunnel setup --domain example.com --token-file /root/cloudflare-token";
const EVERYTHING: &str =
    "pve-sandbox-agent tunnel teardown --everything --token-file /root/cloudflare-token";

#[tokio::test]
async fn settings_of_the_node_are_enough_without_a_domain_in_the_configuration() {
    let node = Installed::start().await;
    node.run(SETUP).await.1.expect("set up");
    let config = node.world.file("agent.toml");
    let text = std::fs::read_to_string(&config).expect("read");
    std::fs::write(&config, text.replace("domain = \"example.com\"\n", "")).expect("written");
    let (said, done) = node.run(EVERYTHING).await;
    assert!(done.expect("gone"), "{said}");
    assert_eq!((node.cloud.records().len(), node.cloud.state().tunnels.len()), (0, 0), "{said}");
    // Now nothing says which tunnel it was.
    let (_, done) = node.run(EVERYTHING).await;
    let told = format!("{:#}", done.expect_err("unknown"));
    assert!(told.contains("no ingress.domain"), "{told}");
}

#[tokio::test]
async fn zone_and_account_are_given_as_to_setup() {
    let variables = |name: &str| match name {
        "CF_API_TOKEN" => Some(TOKEN.to_owned()),
        "CF_ZONE_ID" => Some(ZONE.to_owned()),
        "CF_ACCOUNT_ID" => Some(ACCOUNT.to_owned()),
        _ => None,
    };
    let flags = format!("{EVERYTHING} --zone-id {ZONE} --account-id {ACCOUNT}");
    let everything = "pve-sandbox-agent tunnel teardown --everything".to_owned();
    for (node, line) in
        [(Installed::start().await, flags), (Installed::with(variables).await, everything)]
    {
        node.run(SETUP).await.1.expect("set up");
        node.run("pve-sandbox-agent tunnel teardown").await.1.expect("left");
        node.cloud.state().may.zones = false;
        let (said, done) = node.run(&line).await;
        done.unwrap_or_else(|error| panic!("{line}: {error:#}\n{said}"));
        let left = (node.cloud.records().len(), node.cloud.state().tunnels.len());
        assert_eq!(left, (0, 0), "{line}: {said}");
    }
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
    let (told, done) = tear_down(&other, Some(&cloud), DO).await;
    done.expect("gone");
    assert_eq!((cloud.records().len(), cloud.state().tunnels.len()), (2, 1));
    assert!(told.iter().any(|line| is_foreign_note(line, "office")), "{told:?}");
}

fn is_foreign_note(line: &str, tunnel: &str) -> bool {
    let leads = format!("the DNS record *.example.com leads to the tunnel {tunnel}, and stays");
    line.starts_with("note") && line.contains(&leads)
}

#[tokio::test]
async fn record_of_somebody_else_that_leads_to_the_tunnel_is_named_before_the_tunnel_goes() {
    let (cloud, world) = set_up().await;
    for record in cloud.state().records.values_mut().flatten() {
        record["comment"] = json!("mine");
    }
    for order in [Order { dry_run: true, ..DO }, DO] {
        let (told, done) = tear_down(&world, Some(&cloud), order).await;
        done.expect("gone");
        let at = |is: &dyn Fn(&String) -> bool| told.iter().position(is);
        let note = at(&|line| is_foreign_note(line, "pve-sandbox-example-com"));
        let deletion = at(&|line| line.contains("delete the tunnel pve-sandbox-example-com"));
        assert!(note.is_some() && note < deletion, "{told:?}");
    }
    assert_eq!((cloud.records().len(), cloud.state().tunnels.len()), (1, 0));
}

#[tokio::test]
async fn disabled_connector_without_a_connection_is_stopped_too() {
    let (_cloud, world) = set_up().await;
    std::fs::write(world.file("edge"), "0").expect("written");
    world.node.systemctl(&["restart", "pve-sandbox-tunnel"]).await.expect("restarted");
    std::fs::remove_file(world.file("enabled")).expect("disabled");
    world.systemctl();
    tear_down(&world, None, DO).await.1.expect("gone");
    assert_eq!(world.systemctl(), ["disable --now --quiet pve-sandbox-tunnel"]);
    assert_eq!(world.pid(), None);
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
