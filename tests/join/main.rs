//! From a bare node to a joined one, on the loopback: the shipped controller, the agent's join command,
//! and an agent that serves with what the command wrote. Certificates of seconds renew themselves under
//! open streams. And `doctor` of both, which looks at what they have made, and `setup` that is repeated.
#![expect(
    clippy::disallowed_methods,
    reason = "remedies are run as processes, and nft beside them"
)]

mod controller;
mod doctor;
mod doctor_network;
mod node;
mod patient;
mod repeat;
mod served;
mod sick;
mod world;

use std::{path::Path, time::Duration};

use agent::{
    bridge::{self, Plan},
    join::{Error, Line},
};
use proto::{
    Reason,
    agent::v1::{WatchRequest, agent_service_client::AgentServiceClient, watch_response::Message},
    sandbox::v1::{EventKind, Invariant},
};
use tokio::time::{sleep, timeout};

use node::Node;
use world::World;

/// Life of certificates in these tests: each is renewed after half of it.
const LIFE: Duration = Duration::from_secs(6);

fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(path).expect("it is there").permissions().mode() & 0o777
}

#[tokio::test(flavor = "multi_thread")]
async fn bare_node_joins_with_one_line_and_its_agent_is_found() {
    let world = World::start(Duration::from_secs(3600)).await;
    let node = Node::new("n1");
    let line = world.line("n1").await;
    let done = node.join(&line).await.expect("it joins");
    assert!(done.iter().any(|step| step.contains("joined")), "{done:?}");
    assert_eq!(mode(&node.file("tls/node.key")), 0o600);
    assert_eq!(mode(&node.file("tls/ingress-node.key")), 0o600);
    let config = node.config();
    assert!(
        config.contains("# the operator's own") && config.contains("pool = \"10.100.1.0/24\""),
        "{config}"
    );

    let serving = node.serve().await;
    world.until_ready("n1").await;
    let end = world.certificate_end("n1").await.expect("its end is known");
    assert!(end.seconds > 0);

    // The same line again has nothing to ask for: what is left of the node's setup can go on.
    let before = node.certificate();
    let done = node.join(&line).await.expect("it has joined");
    assert!(done.len() == 1 && done[0].contains("already with this token"), "{done:?}");
    assert_eq!(node.certificate(), before);
    // A line that asks for something else needs another token; without one nothing changes.
    let other = Line { pool: "10.100.9.0/24".parse().ok(), ..line.clone() };
    match node.join(&other).await.expect_err("new keys, and a used token") {
        Error::Call(error) => {
            let told = error.to_string();
            assert!(told.contains("it is used") && told.contains("agent setup"), "{told}");
        }
        error @ (Error::Line(_)
        | Error::Config(_)
        | Error::Bridge(_)
        | Error::Listen { .. }
        | Error::Name(_)
        | Error::File(..)) => panic!("{error}"),
    }
    assert_eq!(node.certificate(), before);
    node.join(&world.line("n1").await).await.expect("it joins again");
    assert_ne!(node.certificate(), before);
    drop(serving);
}

/// Routes of a node on a network that has all of 10.0.0.0/8.
const WIDE: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
vmbr0\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0
";

/// Returns the network of the bridge that the node would get now, or why it gets none.
fn planned(node: &Node, subnet: Option<&str>) -> Result<String, String> {
    let subnet = subnet.map(|subnet| subnet.parse().expect("a network"));
    match bridge::plan(subnet, &node.bridge(), &node.file("net")) {
        Ok(Plan::Make(bridge)) => Ok(bridge.address.to_string()),
        Ok(Plan::Named(name)) => panic!("{name} is named"),
        Err(error) => Err(error.to_string()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn taken_network_is_refused_while_the_token_is_good_and_another_pool_helps() {
    let world = World::start(LIFE).await;
    let node = Node::new("n1");
    std::fs::write(node.file("proc/net/route"), WIDE).expect("written");
    let mut line = Line { no_bridge: false, ..world.line("n1").await };
    let before = node.config();
    let error = node.join(&line).await.expect_err("no bridge can be made");
    let names_the_remedy = |why: &bridge::Error| why.to_string().contains("join with --pool");
    assert!(matches!(&error, Error::Bridge(why) if names_the_remedy(why)), "{error}");
    assert_eq!(node.config(), before, "nothing was done");
    line.pool = Some("172.20.0.0/24".parse().expect("a pool"));
    node.join(&line).await.expect("the same token");
    assert_eq!(planned(&node, None).as_deref(), Ok("172.20.0.1/24"));
}

#[tokio::test(flavor = "multi_thread")]
async fn node_that_has_joined_gets_another_network_by_another_join() {
    let world = World::start(LIFE).await;
    let node = Node::new("n1");
    node.join(&world.line("n1").await).await.expect("it joins without a bridge");
    std::fs::write(node.file("proc/net/route"), WIDE).expect("written");
    let error = planned(&node, None).expect_err("taken");
    assert!(error.contains("join with --pool") && error.contains("new token"), "{error}");
    // The addresses that the controller knows would lie elsewhere than the bridge.
    let error = planned(&node, Some("172.20.0.0/24")).expect_err("the pool is elsewhere");
    assert!(error.contains("join with --pool 172.20.0.0/24"), "{error}");
    let line = world.line("n1").await;
    let pool = Some("172.20.0.0/24".parse().expect("a pool"));
    node.join(&Line { no_bridge: false, pool, ..line }).await.expect("it joins again");
    assert_eq!(planned(&node, None).as_deref(), Ok("172.20.0.1/24"));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_network_is_refused_while_a_sandbox_is_in_the_present_one_and_the_token_stays_good()
{
    let world = World::start(LIFE).await;
    let node = Node::new("n1");
    let line = Line { no_bridge: false, ..world.line("n1").await };
    node.join(&line).await.expect("it joins");
    let Ok(Plan::Make(bridge)) = bridge::plan(None, &node.bridge(), &node.file("net")) else {
        panic!("no bridge is planned");
    };
    bridge::write(&bridge, &node.bridge()).expect("written");
    let config = node.file("pve/nodes/n1/lxc/101001.conf");
    std::fs::create_dir_all(config.parent().expect("a folder")).expect("made");
    let text = format!(
        "#pve-sandbox%3Av1 id=x\nnet0: name=eth0,bridge={},ip=10.100.1.9/24,gw=10.100.1.1\n",
        bridge.name
    );
    std::fs::write(&config, text).expect("written");

    let pool = "172.20.0.0/24".parse().ok();
    let line = Line { no_bridge: false, pool, ..world.line("n1").await };
    let (before, certificate) = (node.config(), node.certificate());
    let error = node.join(&line).await.expect_err("it would be cut off");
    let names_it = |why: &bridge::Error| why.to_string().contains("101001");
    assert!(matches!(&error, Error::Bridge(why) if names_it(why)), "{error}");
    assert_eq!((node.config(), node.certificate()), (before, certificate), "nothing was done");
    std::fs::remove_file(&config).expect("it is moved");
    node.join(&line).await.expect("the same token");
    assert_eq!(planned(&node, None).as_deref(), Ok("172.20.0.1/24"));
}

#[tokio::test(flavor = "multi_thread")]
async fn node_of_ipv6_gets_an_agent_that_listens_there_unless_the_operator_has_set_where() {
    let world = World::start(LIFE).await;
    let node = Node::new("n1");
    let before = node.config();
    let line = Line { address: "::1".parse().ok(), ..world.line("n1").await };
    let error = node.join(&line).await.expect_err("listen = \"127.0.0.1:PORT\"");
    let told = error.to_string();
    assert!(told.contains("its token is still good") && told.contains("\"[::]:"), "{told}");
    assert_eq!(node.config(), before, "nothing was done");

    // The default is not the operator's.
    let without = before.lines().filter(|line| !line.starts_with("listen = "));
    let without = without.collect::<Vec<_>>().join("\n") + "\n";
    std::fs::write(node.file("agent.toml"), &without).expect("written");
    let done = node.join(&line).await.expect("the same token");
    assert!(done.iter().any(|step| step.starts_with("set listen = \"[::]:7445\"")), "{done:?}");
    let after = node.config();
    assert!(after.starts_with("listen = \"[::]:7445\"\n"), "{after}");
    let (own, _) = without.split_once("[pve]").expect("a table");
    assert!(after.contains(own), "{own} in {after}");
}

#[tokio::test(flavor = "multi_thread")]
async fn node_refuses_a_controller_with_another_ca() {
    let (world, other) = (World::start(LIFE).await, World::start(LIFE).await);
    let node = Node::new("n1");
    let mut line = world.line("n1").await;
    line.ca_sha256 = other.line("n1").await.ca_sha256;
    let error = node.join(&line).await.expect_err("not the controller that was meant");
    assert!(format!("{error}").contains("certificate"), "{error}");
    assert!(!node.file("tls/node.crt").exists(), "nothing was written");
    // The token was not shown to anybody: it is still good.
    line.ca_sha256 = world.line_of_ca().await;
    node.join(&line).await.expect("it joins");
}

#[tokio::test(flavor = "multi_thread")]
async fn join_that_crashed_midway_works_with_the_same_line() {
    let world = World::start(LIFE).await;
    let node = Node::new("n1");
    let line = world.line("n1").await;
    // The answer has come, and the agent's certificate cannot be written: its draft has no room.
    std::fs::create_dir_all(node.file("tls/node.crt.new")).expect("in the way");
    node.join(&line).await.expect_err("a directory is in the way");
    assert!(node.file("tls/ingress-node.crt").exists(), "the token is used");
    std::fs::remove_dir(node.file("tls/node.crt.new")).expect("out of the way");
    let done = node.join(&line).await.expect("the same line again");
    assert!(done[0].contains("joined") && !done[0].contains("already"), "{done:?}");
    let serving = node.serve().await;
    world.until_ready("n1").await;
    drop(serving);
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_renew_themselves_under_an_open_stream() {
    let world = World::start(LIFE).await;
    let node = Node::new("n1");
    node.join(&world.line("n1").await).await.expect("it joins");
    let serving = node.serve().await;
    world.until_ready("n1").await;
    // Before its agent was started, it was down.
    let downs = async || {
        let events = world.events().await;
        events.iter().filter(|kind| **kind == EventKind::NodeDown).count()
    };
    let down_before = downs().await;

    // A stream of reports, one each second, over one connection.
    let mut client = AgentServiceClient::new(world.channel_to(&node));
    let request = WatchRequest::default();
    let mut stream = client.watch(request).await.expect("a watch").into_inner();
    let begun = tokio::time::Instant::now();
    let (mut reports, mut certificates) = (Vec::new(), vec![node.certificate()]);
    let watched = async {
        while let Some(message) = stream.message().await.expect("the stream goes on") {
            if let Some(Message::Load(load)) = message.message {
                reports.push(load.seq);
            }
            let now = node.certificate();
            if certificates.last() != Some(&now) {
                certificates.push(now);
            }
            if certificates.len() > 4 {
                return;
            }
        }
        panic!("the stream ended");
    };
    timeout(LIFE * 5, watched).await.expect("renewed in time");
    // In order, about one each second. Others ask for reports, too, so numbers are left out.
    let seconds = usize::try_from(begun.elapsed().as_secs()).expect("a short test");
    assert!(reports.len() * 2 >= seconds, "{seconds} s: {reports:?}");
    assert!(reports.is_sorted(), "{reports:?}");
    // The link of the controller stayed up all the time, and the first certificate is long over.
    assert_eq!(downs().await, down_before);
    // New connections work with the new certificates of both.
    let mut fresh = AgentServiceClient::new(world.channel_to(&node));
    fresh.get_load(proto::agent::v1::GetLoadRequest {}).await.expect("answered");
    let findings = world.findings().await;
    assert!(findings.is_empty(), "{findings:?}");
    // What is on the disk is what it serves with: a restart finds it whole.
    drop(serving);
    let serving = node.serve().await;
    world.until_ready("n1").await;
    drop(serving);
}

#[tokio::test(flavor = "multi_thread")]
async fn overdue_renewal_is_an_event_and_a_finding() {
    let world = World::start(LIFE).await;
    let node = Node::new("n1");
    node.join(&world.line("n1").await).await.expect("it joins");
    let serving = node.serve().await;
    // Its disk refuses new keys.
    std::fs::create_dir_all(node.file("tls/node.key.next")).expect("in the way");
    world.until_ready("n1").await;
    let told = async {
        while !world.events().await.contains(&EventKind::CertificateOverdue) {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(LIFE * 2, told).await.expect("it is told");
    let findings = world.findings().await;
    assert_eq!(findings, [Invariant::Certificate], "{findings:?}");
    let events = world.events().await;
    let overdue = events.iter().filter(|kind| **kind == EventKind::CertificateOverdue).count();
    assert_eq!(overdue, 1, "{events:?}");
    drop(serving);
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_node_is_cut_off_at_once_and_may_not_renew() {
    let world = World::start(LIFE).await;
    let node = Node::new("n1");
    node.join(&world.line("n1").await).await.expect("it joins");
    let serving = node.serve().await;
    world.until_ready("n1").await;
    world.revoke("n1").await.expect("revoked");
    world.until_down("n1").await;
    let before = node.certificate();
    let refused = async {
        while !world.reason_of("n1").await.contains("revoked") {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(3), refused).await.expect("it is refused, and told why");
    sleep(LIFE.mul_f64(0.75)).await;
    assert_eq!(node.certificate(), before, "nothing was renewed");
    assert_eq!(world.revoke("n5").await, Err(Some(Reason::NodeNotFound)));
    // It joins again with a new token, and is back.
    node.join(&world.line("n1").await).await.expect("it joins again");
    drop(serving);
    let serving = node.serve().await;
    world.until_ready("n1").await;
    drop(serving);
}

/// Interval of the controller's looks at nodes that have not heard of a revocation or a join.
const LOOK: Duration = Duration::from_secs(5);
/// Longest time until a node hears, on a busy machine.
const LATER: Duration = Duration::from_secs(20);

/// Waits until a node refuses a peer's certificate, or accepts it; returns how long it took.
async fn until_it_refuses(node: &Node, certificate: &str, refuses: bool) -> Duration {
    let begun = tokio::time::Instant::now();
    let told = async {
        while node.refuses(certificate) != refuses {
            sleep(Duration::from_millis(20)).await;
        }
    };
    let in_time = timeout(LATER, told).await;
    in_time.unwrap_or_else(|_| panic!("{}: not refuses={refuses} in time", node.name()));
    begun.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn other_nodes_refuse_the_hop_of_a_revoked_node_until_it_joins_again() {
    let world = World::start(Duration::from_secs(3600)).await;
    let (first, second, late) = (Node::new("n1"), Node::new("n2"), Node::new("n3"));
    for node in [&first, &second, &late] {
        node.join(&world.line(node.name().as_str()).await).await.expect("it joins");
    }
    let (_first, _second) = (first.serve().await, second.serve().await);
    world.until_ready("n1").await;
    world.until_ready("n2").await;
    let (old, others) = (first.hop_certificate(), late.hop_certificate());
    assert!(!second.refuses(&old));

    world.revoke("n1").await.expect("revoked");
    until_it_refuses(&second, &old, true).await;
    assert!(!second.refuses(&others), "another's is accepted");
    // One that was down is told when it is back.
    assert!(!late.refuses(&old));
    let _late = late.serve().await;
    world.until_ready("n3").await;
    until_it_refuses(&late, &old, true).await;

    // Certificates count whole seconds.
    sleep(Duration::from_millis(2100)).await;
    first.join(&world.line("n1").await).await.expect("it joins again");
    let new = first.hop_certificate();
    assert_ne!(new, old);
    until_it_refuses(&second, &new, false).await;
    assert!(second.refuses(&old), "the one before stays refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn revocations_of_a_lost_controller_are_void_with_one_that_has_revoked_nobody() {
    let world = World::start(Duration::from_secs(3600)).await;
    let (told, other) = (Node::new("n1"), Node::new("n2"));
    for node in [&told, &other] {
        node.join(&world.line(node.name().as_str()).await).await.expect("it joins");
    }
    told.has_revoked(other.name());
    assert!(told.refuses(&other.hop_certificate()));
    let _told = told.serve().await;
    until_it_refuses(&told, &other.hop_certificate(), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn node_that_is_connected_hears_of_revocations_and_joins_at_once() {
    let world = World::start(Duration::from_secs(3600)).await;
    let told = Node::new("n1");
    let others = ["n2", "n3", "n4", "n5", "n6", "n7"].map(Node::new);
    for node in [&told].into_iter().chain(&others) {
        node.join(&world.line(node.name().as_str()).await).await.expect("it joins");
    }
    let _told = told.serve().await;
    world.until_ready("n1").await;
    // One after another: a node that heard by the looks alone would wait for a whole one each time but the first.
    // Busy cores may make one of them late, but not all.
    let (mut revoked, mut joined) = (Duration::ZERO, Duration::ZERO);
    for node in &others {
        world.revoke(node.name().as_str()).await.expect("revoked");
        revoked += until_it_refuses(&told, &node.hop_certificate(), true).await;
    }
    // Certificates count whole seconds.
    sleep(Duration::from_millis(2100)).await;
    for node in &others {
        node.join(&world.line(node.name().as_str()).await).await.expect("it joins again");
        joined += until_it_refuses(&told, &node.hop_certificate(), false).await;
    }
    let bound = LOOK * 6 / 2;
    assert!(revoked < bound && joined < bound, "{revoked:?} and {joined:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn controllers_own_certificate_renews_itself_under_an_open_stream() {
    let world = World::start(LIFE).await;
    let first = world.own_certificate();
    let mut stream = world.follow_events().await;
    let renewed = async {
        while world.own_certificate() == first {
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(LIFE * 2, renewed).await.expect("renewed in time");
    // The stream that was open before still brings what happens now.
    world.line("n1").await;
    let told = async {
        loop {
            let message = stream.message().await.expect("it goes on").expect("it has not ended");
            let kind = message.event.map(|event| event.kind());
            if kind == Some(EventKind::NodeTokenCreated) {
                return;
            }
        }
    };
    timeout(Duration::from_secs(10), told).await.expect("told");
}
