//! Missing answers that take a node out of placement: those of the agent, never those of a sandbox.

use proto::sandbox::v1::*;

use super::*;
use crate::node::calls::{Call, Silence};

/// Makes the request that causes this call about `sandbox`, and expects no answer. False for a call
/// that no request causes by itself.
async fn ask(lab: &Lab, call: Call, sandbox: &Sandbox) -> bool {
    let (mut api, mut operator) = (lab.api(), lab.operator());
    let (id, node, vmid) = (sandbox.id.clone(), sandbox.node.clone(), sandbox.vmid);
    let exec_id = "e1".to_owned();
    let failed = match call {
        Call::StartSandbox => api.start_sandbox(StartSandboxRequest { id }).await.is_err(),
        Call::StopSandbox => {
            api.stop_sandbox(StopSandboxRequest { id, grace: None }).await.is_err()
        }
        Call::PauseSandbox => {
            api.pause_sandbox(PauseSandboxRequest { id, or_stop: false }).await.is_err()
        }
        Call::ResumeSandbox => api.resume_sandbox(ResumeSandboxRequest { id }).await.is_err(),
        Call::UpdateSandbox => {
            let change = Sandbox { id, ..Sandbox::default() };
            api.update_sandbox(proto::update::request(change, &["name"])).await.is_err()
        }
        Call::DeleteSandbox => api.delete_sandbox(DeleteSandboxRequest { id }).await.is_err(),
        Call::Exec => {
            let command = Some(exec_start::Command::Shell("true".into()));
            let start = Some(ExecStart { id, command, ..ExecStart::default() });
            let request = ExecCommandRequest { start, ..ExecCommandRequest::default() };
            api.exec_command(request).await.is_err()
        }
        Call::ControlExec => {
            api.signal_exec(SignalExecRequest { id, exec_id, signal: 15 }).await.is_err()
        }
        Call::ListExecs => {
            api.list_execs(ListExecsRequest { id, ..Default::default() }).await.is_err()
        }
        Call::Files => {
            let request = StatFileRequest { id, path: "/etc".into(), ..StatFileRequest::default() };
            api.stat_file(request).await.is_err()
        }
        Call::Forward => {
            let target = Some(forward_open::Target::UnixPath("/run/a.sock".into()));
            let open = forward_request::Message::Open(ForwardOpen { id, target });
            let first = ForwardRequest { message: Some(open) };
            api.forward(futures_util::stream::iter([first])).await.is_err()
        }
        Call::ForwardListen => {
            api.forward_listen(ForwardListenRequest { id, port: 80 }).await.is_err()
        }
        Call::ListPorts => api.list_ports(ListPortsRequest { id }).await.is_err(),
        // A node without an answer leaves the other nodes' figures.
        Call::GetUsage => {
            api.get_usage(GetUsageRequest { ids: vec![id], ..Default::default() }).await.is_ok()
        }
        Call::ExposeHttpService => {
            let request =
                ExposeHttpServiceRequest { id, name: "web".into(), port: 80, visibility: 0 };
            api.expose_http_service(request).await.is_err()
        }
        Call::HideHttpService => {
            api.hide_http_service(HideHttpServiceRequest { id, name: "web".into() }).await.is_err()
        }
        Call::CreateAccessLink => {
            let request =
                CreateAccessLinkRequest { id, service: "web".into(), ..Default::default() };
            api.create_access_link(request).await.is_err()
        }
        Call::RevokeAccess => {
            api.revoke_access(RevokeAccessRequest { id, service: "web".into() }).await.is_err()
        }
        Call::CollectGarbage => {
            let asked = CollectGarbageRequest { dry_run: true, node };
            let told = operator.collect_garbage(asked).await;
            told.map_or(true, |told| !told.into_inner().unreachable.is_empty())
        }
        Call::RecoverSandbox => {
            let request = RecoverSandboxRequest { node, vmid: vmid + 1, dry_run: true };
            operator.recover_sandbox(request).await.is_err()
        }
        Call::AdoptSandbox => {
            let team = "red".to_owned();
            let request = AdoptSandboxRequest { node, vmid: vmid + 1, team, dry_run: true };
            operator.adopt_sandbox(request).await.is_err()
        }
        Call::ReleaseSandbox => {
            operator.release_sandbox(ReleaseSandboxRequest { id }).await.is_err()
        }
        Call::Check => {
            let report = operator.fsck(FsckRequest {}).await.expect("a report").into_inner();
            report.nodes < 3
        }
        Call::SetScheduling => {
            let request = CordonNodeRequest { node, why: "test".into() };
            operator.cordon_node(request).await.is_err()
        }
        Call::CancelCreate | Call::ExportSandbox | Call::ImportSandbox => return false,
        Call::RequestCertificates
        | Call::InstallCertificates
        | Call::SetRevokedNodes
        | Call::SetNames => return false,
        Call::Hello
        | Call::CreateSandbox
        | Call::GetSandbox
        | Call::ListSandboxes
        | Call::GetLoad
        | Call::Watch
        | Call::Reserve
        | Call::CancelReservation => return false,
    };
    assert!(failed, "{call:?} was answered");
    true
}

/// Returns the nodes that get no new work, with the reason.
async fn not_ready(lab: &Lab) -> Vec<(String, String)> {
    let nodes = lab.operator().list_nodes(ListNodesRequest {}).await.expect("nodes").into_inner();
    let out = nodes.nodes.into_iter().filter(|node| !node.ready);
    out.map(|node| (node.name, node.reason)).collect()
}

#[tokio::test(start_paused = true)]
async fn call_that_waits_for_a_sandbox_does_not_trip_the_breaker() {
    let mut asked = 0;
    for &call in Call::ALL {
        if call.silence() == Silence::Agent {
            continue;
        }
        let lab = Lab::new().await;
        let sandbox = lab.create("r1").await.expect("made");
        let holder = lab.holder(&sandbox.id).clone();
        if matches!(call, Call::HideHttpService | Call::CreateAccessLink | Call::RevokeAccess) {
            ask_to_expose(&lab, &sandbox.id).await;
        }
        holder.faults(|faults| faults.unanswered = Some(call));
        // Several times, as a tenant would who wants the node for itself.
        for _ in 0..3 {
            if ask(&lab, call, &sandbox).await {
                assert!(holder.swallowed() > 0, "{call:?} never came to the node");
                assert_eq!(not_ready(&lab).await, [], "after {call:?}");
                asked += 1;
            }
        }
        let bystander = lab.create(&format!("after-{call:?}")).await.expect("placed");
        lab.get(&bystander.id).await.expect("known");
    }
    assert_eq!(asked, 3 * 23, "all but those that no request leads to");
}

async fn ask_to_expose(lab: &Lab, id: &str) {
    let request =
        ExposeHttpServiceRequest { id: id.into(), name: "web".into(), port: 80, visibility: 0 };
    lab.api().expose_http_service(request).await.expect("exposed");
}

#[tokio::test(start_paused = true)]
async fn every_kind_of_call_is_decoded_as_its_own_silence() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let id = sandbox.id.parse().expect("an id");
    let holder = lab.holder(&sandbox.id).clone();
    let node = lab.domain().nodes().get(holder.name()).expect("known");
    let (client, wait) = (&node.client, Duration::from_secs(1));
    let unknown = |error: node::Error| matches!(error, node::Error::Unknown(_));
    let silent = |error: node::Error| matches!(error, node::Error::Silent(_));
    let swallow = |call| holder.faults(|faults| faults.unanswered = Some(call));

    swallow(Call::CancelCreate);
    assert!(unknown(client.cancel_create(1, &id, 1).await.expect_err("swallowed")));
    swallow(Call::ExportSandbox);
    assert!(unknown(client.export_sandbox(1, &id, holder.name()).await.expect_err("swallowed")));
    swallow(Call::ImportSandbox);
    assert!(unknown(client.import_sandbox(1, bytes::Bytes::new()).await.expect_err("swallowed")));
    swallow(Call::StopSandbox);
    let calls = client.calls(node::Origin::Caller, &"red".parse().expect("a team"));
    let stopped = calls.expect("a place").stop(1, &id, None, wait).await;
    assert!(unknown(stopped.expect_err("swallowed")));

    swallow(Call::Hello);
    assert!(silent(client.hello(0).await.expect_err("swallowed")));
    swallow(Call::GetSandbox);
    assert!(silent(client.get(&id).await.expect_err("swallowed")));
    swallow(Call::CancelReservation);
    assert!(silent(client.cancel_reservation(&id).await.expect_err("swallowed")));
    swallow(Call::Reserve);
    let reservation = (&SNAPSHOT.parse().expect("a snapshot"), Size::default());
    assert!(silent(client.reserve(1, &id, reservation, wait).await.expect_err("swallowed")));
}

#[tokio::test(start_paused = true)]
async fn silent_agent_gets_no_new_work() {
    // A creation.
    let lab = Lab::new().await;
    let first = lab.agents[0].clone();
    first.faults(|faults| faults.unanswered = Some(Call::CreateSandbox));
    let mut names = Vec::new();
    for n in 0..6 {
        let api = lab.api();
        let asked = request(&format!("r{n}"));
        names.push(tokio::spawn(async move {
            let mut api = api;
            create(&mut api, asked).await
        }));
    }
    let mut tries = 0;
    while first.swallowed() == 0 || not_ready(&lab).await.is_empty() {
        tries += 1;
        assert!(tries < 1000, "its silence is not noticed");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let out = not_ready(&lab).await;
    assert_eq!((out.len(), out[0].0.as_str()), (1, "n1"), "{out:?}");
    assert!(out[0].1.contains("time out"), "{out:?}");
    names.into_iter().for_each(|task| task.abort());

    // A cordon.
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    lab.holder(&sandbox.id).faults(|faults| faults.unanswered = Some(Call::SetScheduling));
    assert!(ask(&lab, Call::SetScheduling, &sandbox).await);
    let out = not_ready(&lab).await;
    assert_eq!((out.len(), &out[0].0), (1, &sandbox.node), "{out:?}");
}

#[tokio::test(start_paused = true)]
async fn dead_agent_is_noticed_without_a_call() {
    for call in [Call::Hello, Call::Watch] {
        let lab = Lab::new().await;
        let agent = &lab.agents[0];
        agent.faults(|faults| faults.unanswered = Some(call));
        agent.down();
        agent.up();
        // The longest silence of a watch, and one try to connect.
        tokio::time::sleep(Duration::from_secs(11)).await;
        let out = not_ready(&lab).await;
        assert_eq!((out.len(), out[0].0.as_str()), (1, "n1"), "{call:?}: {out:?}");
        agent.faults(|faults| faults.unanswered = None);
        tokio::time::sleep(Duration::from_secs(11)).await;
        assert_eq!(not_ready(&lab).await, [], "{call:?}: it is back");
    }
}
