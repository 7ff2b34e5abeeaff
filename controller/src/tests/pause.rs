//! Pausing, resuming, waking and usage, through to the nodes.

use proto::{Reason, sandbox::v1::*};

use super::*;

#[tokio::test(start_paused = true)]
async fn what_is_paused_is_shown_so_and_runs_on_when_resumed() {
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
    api.stop_sandbox(StopSandboxRequest { id: id() }).await.expect("stopped");
    let request = PauseSandboxRequest { id: id(), or_stop: false };
    assert_eq!(reason(api.pause_sandbox(request).await), Reason::FreezeFailed);
}

#[tokio::test(start_paused = true)]
async fn what_wakes_it_is_kept_by_its_node() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let mut api = lab.api();
    let wake_on = Some(WakeOn { http: false, ssh: true, exec: false });
    let request = SetWakeOnRequest { id: sandbox.id.clone(), wake_on };
    api.set_wake_on(request).await.expect("set");
    assert_eq!(lab.get(&sandbox.id).await.expect("there").wake_on, wake_on);
    let request = SetWakeOnRequest { id: sandbox.id, wake_on: None };
    assert_eq!(reason(api.set_wake_on(request).await), Reason::FieldInvalid);
}

#[tokio::test(start_paused = true)]
async fn usage_is_of_the_teams_own_that_are_up() {
    let lab = Lab::new().await;
    let mut made = Vec::new();
    for key in ["r1", "r2", "r3"] {
        made.push(lab.create(key).await.expect("made").id);
    }
    let mut api = lab.api();
    let request = PauseSandboxRequest { id: made[1].clone(), or_stop: false };
    api.pause_sandbox(request).await.expect("paused");
    api.stop_sandbox(StopSandboxRequest { id: made[2].clone() }).await.expect("stopped");
    for ids in [vec![], made.clone()] {
        let answer = api.get_usage(GetUsageRequest { ids }).await.expect("told").into_inner();
        let told: Vec<_> = answer.usages.iter().map(|u| (u.id.clone(), u.frozen)).collect();
        let mut expected = vec![(made[0].clone(), false), (made[1].clone(), true)];
        expected.sort();
        assert_eq!(told, expected);
    }
    let blue = token(&lab.store, "blue", "sandbox").await;
    let none = lab.api_as(&blue).get_usage(GetUsageRequest::default()).await.expect("told");
    assert_eq!(none.into_inner().usages, []);
    let many = GetUsageRequest { ids: vec![made[0].clone(); 201] };
    assert_eq!(reason(api.get_usage(many).await), Reason::FieldInvalid);
}
