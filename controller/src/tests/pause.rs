//! Pausing, resuming, waking and usage, through to the nodes.

use proto::{Reason, sandbox::v1::*};

use super::*;

#[tokio::test(start_paused = true)]
async fn paused_sandbox_is_shown_paused_and_resumes() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let id = || sandbox.id.clone();
    let mut api = lab.api();
    for _ in 0..2 {
        let request = PauseSandboxRequest { id: id(), or_stop: false };
        let paused = api.pause_sandbox(request).await.expect("paused").into_inner().sandbox;
        assert_eq!(paused.map(|s| s.phase()), Some(Phase::Paused));
    }
    assert_eq!(lab.get(&sandbox.id).await.expect("there").phase(), Phase::Paused);
    for _ in 0..2 {
        let request = ResumeSandboxRequest { id: id() };
        let resumed = api.resume_sandbox(request).await.expect("resumed").into_inner().sandbox;
        let resumed = resumed.expect("a sandbox");
        assert_eq!((resumed.phase(), resumed.boot), (Phase::Running, sandbox.boot));
    }
    api.stop_sandbox(StopSandboxRequest { id: id(), grace: None }).await.expect("stopped");
    let request = PauseSandboxRequest { id: id(), or_stop: false };
    assert_eq!(reason(api.pause_sandbox(request).await), Reason::FreezeFailed);
}

#[tokio::test(start_paused = true)]
async fn wake_on_is_stored_by_the_node() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let mut api = lab.api();
    let wake_on = Some(WakeOn { http: false, ssh: true, exec: false });
    let change = Sandbox { id: sandbox.id.clone(), wake_on, ..Sandbox::default() };
    api.update_sandbox(proto::update::request(change, &["wake_on"])).await.expect("set");
    assert_eq!(lab.get(&sandbox.id).await.expect("there").wake_on, wake_on);
}

#[tokio::test(start_paused = true)]
async fn usage_covers_the_teams_own_sandboxes_that_are_up() {
    let lab = Lab::new().await;
    let mut made = Vec::new();
    for key in ["r1", "r2", "r3"] {
        made.push(lab.create(key).await.expect("made").id);
    }
    let mut api = lab.api();
    let request = PauseSandboxRequest { id: made[1].clone(), or_stop: false };
    api.pause_sandbox(request).await.expect("paused");
    api.stop_sandbox(StopSandboxRequest { id: made[2].clone(), grace: None })
        .await
        .expect("stopped");
    for ids in [vec![], made.clone()] {
        let answer = api
            .get_usage(GetUsageRequest { ids, ..Default::default() })
            .await
            .expect("told")
            .into_inner();
        let told: Vec<_> = answer.usages.iter().map(|u| (u.id.clone(), u.frozen)).collect();
        let mut expected = vec![(made[0].clone(), false), (made[1].clone(), true)];
        expected.sort();
        assert_eq!(told, expected);
    }
    let blue = token(&lab.store, "blue", "sandbox").await;
    let none = lab.api_as(&blue).get_usage(GetUsageRequest::default()).await.expect("told");
    assert_eq!(none.into_inner().usages, []);
    let many = GetUsageRequest { ids: vec![made[0].clone(); 201], ..Default::default() };
    assert_eq!(reason(api.get_usage(many).await), Reason::FieldInvalid);
}
