//! Nodes are told which sandbox each host name by name leads to.

use proto::{sandbox::v1::*, update};

use super::*;
use crate::node::calls::Call;

impl Lab {
    async fn named(&self, name: &str, services: &[(&str, u32)]) -> Sandbox {
        let service = |(name, port): &(&str, u32)| HttpService {
            name: (*name).into(),
            port: *port,
            ..HttpService::default()
        };
        let services = services.iter().map(service).collect();
        let request = CreateSandboxRequest { name: name.into(), services, ..request(name) };
        create(&mut self.api(), request).await.expect("made")
    }

    /// Waits until every node has exactly these names.
    async fn all_know(&self, expected: &[(&str, &Sandbox)]) {
        let expected = expected.iter().map(|(name, made)| ((*name).to_owned(), made.id.clone()));
        let expected: std::collections::BTreeMap<_, _> = expected.collect();
        let know = |agent: &Arc<FakeAgent>| agent.names().is_some_and(|n| n.ids == expected);
        let told = async {
            while !self.agents.iter().all(know) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let told = tokio::time::timeout(Duration::from_secs(90), told).await;
        let names: Vec<_> = self.agents.iter().map(|agent| agent.names()).collect();
        told.unwrap_or_else(|_| panic!("expected {expected:?}, they have {names:?}"));
    }

    fn tell_names(&self, is_enabled: bool) {
        self.controller.as_ref().expect("a controller").tell_names(is_enabled);
    }

    fn sent(&self) -> Vec<usize> {
        let names = self.agents.iter().filter_map(|agent| agent.names());
        names.map(|names| names.sent).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn every_node_learns_each_change_of_a_name() {
    let lab = Lab::new().await;
    lab.tell_names(true);
    let first = lab.named("box", &[("web", 80)]).await;
    let second = lab.named("shed", &[]).await;
    lab.all_know(&[("box--red", &first)]).await;
    assert!(lab.agents.iter().all(|agent| agent.names().expect("told").enabled));
    let mut api = lab.api();
    let expose = ExposeHttpServiceRequest {
        id: "shed".into(),
        port: 80,
        ..ExposeHttpServiceRequest::default()
    };
    api.expose_http_service(expose).await.expect("exposed");
    lab.all_know(&[("box--red", &first), ("shed--red", &second)]).await;
    // The names change hands.
    let rename = async |id: &str, name: &str| {
        let change = Sandbox { id: id.into(), name: name.into(), ..Sandbox::default() };
        lab.api().update_sandbox(update::request(change, &["name"])).await.expect("renamed");
    };
    rename(&first.id, "barn").await;
    rename(&second.id, "box").await;
    lab.all_know(&[("barn--red", &first), ("box--red", &second)]).await;
    let hide = HideHttpServiceRequest { id: second.id.clone(), name: "port-80".into() };
    api.hide_http_service(hide).await.expect("hidden");
    lab.all_know(&[("barn--red", &first)]).await;
    api.delete_sandbox(DeleteSandboxRequest { id: first.id }).await.expect("deleted");
    lab.all_know(&[]).await;
}

#[tokio::test(start_paused = true)]
async fn restart_sends_nothing_again_and_a_lost_disk_gets_everything() {
    let mut lab = Lab::new().await;
    lab.tell_names(true);
    let first = lab.named("box", &[("web", 80)]).await;
    let second = lab.named("shed", &[("web", 80)]).await;
    let both = [("box--red", &first), ("shed--red", &second)];
    lab.all_know(&both).await;
    let before = lab.sent();
    lab.start().await;
    lab.tell_names(true);
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(lab.sent(), before, "the digests say that they have everything");
    lab.agents[0].forget_names();
    lab.all_know(&both).await;
    assert_eq!(lab.sent(), [2, before[1], before[2]]);
}

#[tokio::test(start_paused = true)]
async fn nodes_without_names_are_left_alone() {
    let lab = Lab::new().await;
    lab.agents[0].faults(|faults| faults.knows_no_names = true);
    lab.tell_names(true);
    let made = lab.named("box", &[("web", 80)]).await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(lab.agents[0].names(), None);
    let told = lab.agents[1].names().expect("told");
    assert_eq!(told.ids, [("box--red".to_owned(), made.id.clone())].into());
    // After the upgrade of its agent, it is told within a minute.
    lab.agents[0].faults(|faults| faults.knows_no_names = false);
    lab.all_know(&[("box--red", &made)]).await;
}

#[tokio::test(start_paused = true)]
async fn names_that_are_switched_off_are_dropped_everywhere() {
    let mut lab = Lab::new().await;
    lab.tell_names(true);
    let made = lab.named("box", &[("web", 80)]).await;
    lab.all_know(&[("box--red", &made)]).await;
    lab.start().await;
    lab.tell_names(false);
    lab.all_know(&[]).await;
    assert!(lab.agents.iter().all(|agent| !agent.names().expect("told").enabled));
}

#[tokio::test(start_paused = true)]
async fn node_that_does_not_answer_holds_up_no_other() {
    let lab = Lab::new().await;
    lab.tell_names(true);
    lab.all_know(&[]).await;
    lab.agents[0].faults(|faults| faults.unanswered = Some(Call::SetNames));
    for number in 0..3_u8 {
        let made = lab.named(&format!("box{number}"), &[("web", 80)]).await;
        let name = format!("box{number}--red");
        let knows = |agent: &Arc<FakeAgent>| {
            agent.names().is_some_and(|names| names.ids.get(&name) == Some(&made.id))
        };
        let told = async {
            while !lab.agents[1..].iter().all(knows) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(3), told).await.expect("told at once");
    }
    assert!(lab.agents[0].swallowed() > 0);
}
