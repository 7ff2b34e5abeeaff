//! Nodes that number their sandboxes from one range of vmids, as two nodes without a cluster do by default.

use proto::{Reason, sandbox::v1::*};

use super::*;
use crate::node::NodeStatus;

/// Request for a sandbox on this node.
fn on(node: &str, request_id: &str) -> CreateSandboxRequest {
    CreateSandboxRequest { node: node.into(), ..request(request_id) }
}

/// Returns the nodes that are not ready, with the reasons, once every node has reported.
async fn not_ready(lab: &Lab) -> Vec<(String, String)> {
    let mut news = lab.domain().nodes().news();
    let is_waiting = |status: &NodeStatus| status.report.is_none();
    let reported = async {
        while lab.domain().nodes().statuses().iter().any(is_waiting) {
            news.changed().await.expect("the registry lives");
        }
    };
    tokio::time::timeout(Duration::from_secs(30), reported).await.expect("all report");
    let statuses = lab.domain().nodes().statuses().into_iter();
    statuses.filter_map(|node| Some((node.name.to_string(), node.not_ready?))).collect()
}

/// Has a node connect anew, and waits for it.
async fn reconnect(lab: &Lab, agent: &FakeAgent) {
    agent.down();
    until_up(lab, agent, false).await;
    agent.up();
    until_up(lab, agent, true).await;
}

async fn until_up(lab: &Lab, agent: &FakeAgent, up: bool) {
    let nodes = lab.domain().nodes();
    let mut news = nodes.news();
    let reached = async {
        while nodes.get(agent.name()).is_some_and(|node| node.down().is_none()) != up {
            news.changed().await.expect("the registry lives");
        }
    };
    tokio::time::timeout(Duration::from_secs(30), reached).await.expect("in time");
}

#[tokio::test(start_paused = true)]
async fn node_with_vmids_of_another_gets_no_new_sandboxes_and_keeps_those_that_it_has() {
    let mut lab = Lab::new().await;
    let made = create(&mut lab.api(), on("n2", "r1")).await.expect("made");
    // n1 comes first in the configuration, and neither has a sandbox from its range.
    lab.agents[0].tells_vmids(500_000, 599_999);
    lab.agents[1].tells_vmids(550_000, 649_999);
    lab.agents[2].tells_vmids(300_000, 399_999);
    lab.start().await;

    let held = not_ready(&lab).await;
    let [(node, why)] = &held[..] else { panic!("{held:?}") };
    assert_eq!(node, "n2");
    for part in ["550000-649999", "500000-599999 of n1", "vmids.stripe"] {
        assert!(why.contains(part), "{why}");
    }
    let refused = create(&mut lab.api(), on("n2", "r2")).await;
    assert_eq!(reason(refused), Reason::NodeCordoned);
    for number in 0..4 {
        let elsewhere = lab.create(&format!("free-{number}")).await.expect("made");
        assert_ne!(elsewhere.node, "n2");
    }
    // Its sandbox lives on.
    let id = made.id.clone();
    assert_eq!(lab.get(&id).await.expect("known").phase(), Phase::Running);
    let stop = StopSandboxRequest { id: id.clone(), grace: None };
    lab.api().stop_sandbox(stop).await.expect("stopped");
    lab.api().start_sandbox(StartSandboxRequest { id: id.clone() }).await.expect("started");
    lab.until(&id, Phase::Running).await;

    // The other one keeps its numbers while it is away, and when it is back.
    lab.agents[0].down();
    until_up(&lab, &lab.agents[0], false).await;
    assert!(not_ready(&lab).await.iter().any(|(node, _)| node == "n2"));
    lab.agents[0].up();
    until_up(&lab, &lab.agents[0], true).await;
    assert_eq!(not_ready(&lab).await, held);

    lab.agents[1].tells_vmids(600_000, 699_999);
    reconnect(&lab, &lab.agents[1]).await;
    assert_eq!(not_ready(&lab).await, []);
    create(&mut lab.api(), on("n2", "r3")).await.expect("made there again");
}

#[tokio::test(start_paused = true)]
async fn range_of_vmids_stays_with_the_node_that_has_sandboxes_from_it() {
    let mut lab = Lab::new().await;
    let made = create(&mut lab.api(), on("n2", "r1")).await.expect("made");
    lab.agents[0].tells_vmids(made.vmid, made.vmid + 99);
    lab.agents[1].tells_vmids(made.vmid, made.vmid + 99);
    for _ in 0..2 {
        lab.start().await;
        let held = not_ready(&lab).await;
        assert_eq!(held.iter().map(|(node, _)| node.as_str()).collect::<Vec<_>>(), ["n1"]);
    }
    assert_eq!(create(&mut lab.api(), on("n2", "r2")).await.expect("made").node, "n2");
}

/// Returns why a node is not ready, once it has reported.
async fn why_not_ready(lab: &Lab, agent: &FakeAgent) -> Option<String> {
    let nodes = lab.domain().nodes();
    let mut news = nodes.news();
    let reported = async {
        loop {
            let mut statuses = nodes.statuses().into_iter();
            let status = statuses.find(|node| node.name == *agent.name()).expect("known");
            if status.report.is_some() {
                return status.not_ready;
            }
            news.changed().await.expect("the registry lives");
        }
    };
    tokio::time::timeout(Duration::from_secs(30), reported).await.expect("it reports")
}

#[tokio::test(start_paused = true)]
async fn numbers_of_a_node_that_is_away_over_a_restart_are_not_given_again() {
    let mut lab = Lab::new().await;
    let made = create(&mut lab.api(), on("n1", "r1")).await.expect("made");
    for agent in &lab.agents[..2] {
        agent.tells_vmids(made.vmid, made.vmid + 99);
    }
    lab.agents[0].down();
    until_up(&lab, &lab.agents[0], false).await;
    lab.start().await;
    let why = why_not_ready(&lab, &lab.agents[1]).await.expect("held back");
    assert!(why.contains(&format!("{0}-{0} of n1", made.vmid)), "{why}");
    assert_eq!(why_not_ready(&lab, &lab.agents[2]).await, None);

    // It is back, with the same range, and then with another one.
    lab.agents[0].up();
    until_up(&lab, &lab.agents[0], true).await;
    assert_eq!(not_ready(&lab).await.len(), 1);
    lab.agents[0].tells_vmids(700_000, 700_099);
    reconnect(&lab, &lab.agents[0]).await;
    assert_eq!(not_ready(&lab).await, []);
}
