//! The API: authorization, size limits, pages, watches, gRPC-Web.

use http::{Request as HttpRequest, StatusCode};
use http_body_util::{BodyExt, Full};
use prost::Message;
use proto::{Reason, sandbox::v1::*};
use tokio_stream::StreamExt;
use tower::ServiceExt;

use super::*;

#[tokio::test(start_paused = true)]
async fn calls_without_a_valid_token_are_refused() {
    let lab = Lab::new().await;
    let list = || ListSandboxesRequest::default();
    let revoked = token(&lab.store, "red", "sandbox").await;
    let (id, _) = proto::token::split(&revoked).expect("a token");
    lab.store.revoke_token(id, 5).await.expect("revoked");
    let other_secret = format!("{}{}", &lab.red[..lab.red.len() - 64], "0".repeat(64));
    for bad in ["", "x", "pvesb_000000000000_00", revoked.as_str(), other_secret.as_str()] {
        let answer = lab.api_as(bad).list_sandboxes(list()).await;
        assert_eq!(answer.as_ref().expect_err("refused").code(), tonic::Code::Unauthenticated);
        assert_eq!(reason(answer), Reason::TokenInvalid, "{bad}");
    }
    let answer = SandboxServiceClient::new(lab.channel()).list_sandboxes(list()).await;
    assert_eq!(reason(answer), Reason::TokenInvalid);
    lab.api().list_sandboxes(list()).await.expect("with one there is");

    let plain = token(&lab.store, "red", "sandbox").await;
    let mut operator = OperatorServiceClient::with_interceptor(lab.channel(), bearer(&plain));
    let answer = operator.list_nodes(ListNodesRequest {}).await;
    assert_eq!(reason(answer), Reason::ScopeMissing);
    let version = operator.get_version(GetVersionRequest {}).await.expect("anybody may");
    assert_eq!(version.into_inner().epoch, 1);
}

#[tokio::test(start_paused = true)]
async fn sandbox_of_another_team_is_not_found() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let blue = token(&lab.store, "blue", "sandbox").await;
    let mut api = lab.api_as(&blue);
    for id in [sandbox.id.clone(), sandbox.vmid.to_string()] {
        let not_found = Reason::SandboxNotFound;
        let get = api.get_sandbox(GetSandboxRequest { id: id.clone() }).await;
        assert_eq!(reason(get), not_found);
        let stop = api.stop_sandbox(StopSandboxRequest { id: id.clone(), grace: None }).await;
        assert_eq!(reason(stop), not_found);
        let start = api.start_sandbox(StartSandboxRequest { id: id.clone() }).await;
        assert_eq!(reason(start), not_found);
        let pause = PauseSandboxRequest { id: id.clone(), or_stop: true };
        assert_eq!(reason(api.pause_sandbox(pause).await), not_found);
        let resume = api.resume_sandbox(ResumeSandboxRequest { id: id.clone() }).await;
        assert_eq!(reason(resume), not_found);
        let change = Sandbox { id: id.clone(), ..Sandbox::default() };
        let change = proto::update::request(change, &["wake_on", "name"]);
        assert_eq!(reason(api.update_sandbox(change).await), not_found);
        let usage = GetUsageRequest { ids: vec![id.clone()], ..Default::default() };
        assert_eq!(reason(api.get_usage(usage).await), not_found);
        let delete = api.delete_sandbox(DeleteSandboxRequest { id: id.clone() }).await;
        assert_eq!(reason(delete), not_found);
        let watch = api.watch_sandbox(WatchSandboxRequest { id: id.clone() }).await;
        assert_eq!(reason(watch), not_found);
        let expose = ExposeHttpServiceRequest {
            id: id.clone(),
            name: String::new(),
            port: 80,
            visibility: 0,
        };
        assert_eq!(reason(api.expose_http_service(expose).await), not_found);
        let hide = HideHttpServiceRequest { id: id.clone(), name: "port-80".into() };
        assert_eq!(reason(api.hide_http_service(hide).await), not_found);
        let subject = Some(explain_placement_request::Subject::Id(id.clone()));
        let explain = api.explain_placement(ExplainPlacementRequest { subject }).await;
        assert_eq!(reason(explain), not_found);
        let argv = Argv { args: vec!["true".into()] };
        let command = Some(exec_start::Command::Argv(argv));
        let start = Some(ExecStart { id, command, ..ExecStart::default() });
        let exec = ExecCommandRequest { start, ..ExecCommandRequest::default() };
        assert_eq!(reason(api.exec_command(exec).await), not_found);
    }
    let list = api.list_sandboxes(ListSandboxesRequest::default()).await.expect("an empty list");
    assert!(list.into_inner().sandboxes.is_empty());
    // The same key of another team is another key.
    let theirs = create(&mut api, request("r1")).await.expect("made");
    assert_ne!(theirs.id, sandbox.id);
}

#[tokio::test(start_paused = true)]
async fn message_of_10_mib_is_too_large() {
    let lab = Lab::new().await;
    let mut large = request("r1");
    large.metadata.insert("k".into(), "x".repeat(10 << 20));
    let answer = create(&mut lab.api(), large).await;
    assert_eq!(answer.as_ref().expect_err("refused").code(), tonic::Code::ResourceExhausted);
    assert_eq!(reason(answer), Reason::TooLarge);
    lab.create("r1").await.expect("and nothing has happened");
}

#[tokio::test(start_paused = true)]
async fn pages_are_ordered_and_complete() {
    let lab = Lab::new().await;
    let mut made = Vec::new();
    for n in 0..7 {
        made.push(lab.create(&format!("r{n}")).await.expect("made").id);
    }
    // All in one millisecond of paused time.
    made.sort_unstable();
    let id = made[3].clone();
    lab.api().delete_sandbox(DeleteSandboxRequest { id }).await.expect("deleted");
    for include_ended in [false, true] {
        let (mut seen, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = ListSandboxesRequest {
                page_size: 2,
                page_token,
                include_ended,
                ..Default::default()
            };
            let page = lab.api().list_sandboxes(request).await.expect("a page").into_inner();
            assert!(page.sandboxes.len() <= 2);
            seen.extend(page.sandboxes.into_iter().map(|sandbox| sandbox.id));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        let expected: Vec<_> =
            made.iter().filter(|id| include_ended || **id != made[3]).cloned().collect();
        assert_eq!(seen, expected);
    }
    let bad = ListSandboxesRequest { page_token: "x".into(), ..ListSandboxesRequest::default() };
    assert_eq!(reason(lab.api().list_sandboxes(bad).await), Reason::FieldInvalid);
    let bad = ListSandboxesRequest { page_size: 1001, ..ListSandboxesRequest::default() };
    assert_eq!(reason(lab.api().list_sandboxes(bad).await), Reason::FieldInvalid);
}

#[tokio::test(start_paused = true)]
async fn watch_sends_every_change_and_ends_with_the_sandbox() {
    let lab = Lab::new().await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.boot = Duration::from_secs(40));
    }
    let wait = Some(prost_types::Duration::default());
    let accepted = create(&mut lab.api(), CreateSandboxRequest { wait, ..request("r1") }).await;
    let id = accepted.expect("accepted").id;
    let watch = lab.api().watch_sandbox(WatchSandboxRequest { id: id.clone() }).await;
    let mut watch = watch.expect("watched").into_inner();
    let mut phases = Vec::new();
    let mut messages = 0;
    while let Some(answer) = watch.next().await {
        let phase = answer.expect("no error").sandbox.expect("a sandbox").phase();
        messages += 1;
        if phases.last() != Some(&phase) {
            phases.push(phase);
        }
        if phase == Phase::Running {
            let delete = DeleteSandboxRequest { id: id.clone() };
            lab.api().delete_sandbox(delete).await.expect("deleted");
        }
    }
    assert_eq!(phases, [Phase::Creating, Phase::Running, Phase::Deleted]);
    assert!(messages >= 5, "it was never silent for 20 s: {messages}");
}

#[tokio::test(start_paused = true)]
async fn exposed_ports_get_urls() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let id = sandbox.id.clone();
    let expose =
        ExposeHttpServiceRequest { id: id.clone(), name: String::new(), port: 3000, visibility: 0 };
    let service = lab.api().expose_http_service(expose).await.expect("exposed").into_inner();
    let service = service.service.expect("a service");
    assert_eq!(service.name, "port-3000");
    assert_eq!(service.url, format!("http://port-3000-vm-{}.test:8480", sandbox.vmid));
    assert_eq!(lab.get(&id).await.expect("known").services[0].url, service.url);
    let hide = HideHttpServiceRequest { id: id.clone(), name: "port-3000".into() };
    let hidden = lab.api().hide_http_service(hide.clone()).await.expect("hidden").into_inner();
    assert!(hidden.sandbox.expect("a sandbox").services.is_empty());
    assert_eq!(reason(lab.api().hide_http_service(hide).await), Reason::ServiceNotFound);
    // A port is closed under all of its names, and no other port is.
    for (name, port) in [("web", 80), ("www", 80), ("api", 81)] {
        let expose =
            ExposeHttpServiceRequest { id: id.clone(), name: name.into(), port, visibility: 0 };
        lab.api().expose_http_service(expose).await.expect("exposed");
    }
    let hide = HideHttpServiceRequest { id: id.clone(), name: "www".into() };
    let hidden = lab.api().hide_http_service(hide).await.expect("hidden").into_inner();
    let names = |services: &[HttpService]| -> Vec<String> {
        services.iter().map(|service| service.name.clone()).collect()
    };
    assert_eq!(names(&hidden.closed), ["web", "www"]);
    assert_eq!(names(&hidden.sandbox.expect("a sandbox").services), ["api"]);
    assert_eq!(names(&lab.get(&id).await.expect("known").services), ["api"]);
    let bad = ExposeHttpServiceRequest { id, name: "A\n".into(), port: 0, visibility: 0 };
    assert_eq!(reason(lab.api().expose_http_service(bad).await), Reason::FieldInvalid);
}

#[tokio::test(start_paused = true)]
async fn url_without_a_domain_leads_past_the_ingress_and_says_so() {
    let mut lab = Lab::new().await;
    lab.urls = Urls::default();
    lab.start().await;
    let id = lab.create("r1").await.expect("made").id;
    let expose = ExposeHttpServiceRequest {
        id: id.clone(),
        port: 3000,
        ..ExposeHttpServiceRequest::default()
    };
    lab.api().expose_http_service(expose.clone()).await.expect("exposed");
    let sandbox = lab.get(&id).await.expect("known");
    let [service] = &sandbox.services[..] else { panic!("one service: {sandbox:?}") };
    assert_eq!(service.url, format!("http://{}:3000", sandbox.ip));
    assert!(service.bypasses_access);
    lab.urls.suffix = Some("lan".parse().expect("a suffix"));
    lab.start().await;
    let again = lab.api().expose_http_service(expose).await.expect("exposed").into_inner();
    let service = again.service.expect("a service");
    assert_eq!((service.url, service.bypasses_access), (format!("http://{id}.lan:3000"), true));
    assert_eq!(service.no_url, "");
}

#[tokio::test(start_paused = true)]
async fn url_by_address_is_of_the_interface_that_the_prefix_names_or_says_why_there_is_none() {
    let mut lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    let expose = ExposeHttpServiceRequest {
        id: id.clone(),
        port: 3000,
        ..ExposeHttpServiceRequest::default()
    };
    lab.api().expose_http_service(expose.clone()).await.expect("exposed");
    let agent = lab.holder(&id);
    let held = agent.living().into_iter().find(|held| held.id == id).expect("held");
    let own = held.ip.clone();
    // The agent of an earlier version tells `ip` alone.
    for several in [false, true] {
        let more = if several { vec![own.clone(), "192.168.9.7".to_owned()] } else { Vec::new() };
        lab.holder(&id).put(Sandbox { addresses: more, ..held.clone() });
        for (prefix, expected) in [
            (None, Some(own.as_str())),
            (Some("192.168."), several.then_some("192.168.9.7")),
            (Some("172.16."), None),
        ] {
            let prefix = prefix.map(|text| text.parse().expect("a prefix"));
            lab.urls = Urls { prefix, ..Urls::default() };
            lab.start().await;
            let again = lab.api().expose_http_service(expose.clone()).await.expect("exposed");
            let told = again.into_inner().service.expect("a service");
            let listed = lab.get(&id).await.expect("known").services[0].clone();
            for service in [told, listed] {
                let url = expected.map(|ip| format!("http://{ip}:3000")).unwrap_or_default();
                assert_eq!(service.url, url, "{:?} {several}", lab.urls);
                assert_eq!(service.no_url.is_empty(), expected.is_some(), "{service:?}");
                assert!(expected.is_some() || service.no_url.contains(&own), "{service:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn link_without_a_domain_is_the_credential_alone() {
    let mut lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    let expose = ExposeHttpServiceRequest {
        id: id.clone(),
        port: 3000,
        visibility: Visibility::Token.into(),
        ..ExposeHttpServiceRequest::default()
    };
    lab.api().expose_http_service(expose).await.expect("exposed");
    // By the container's address, by its name, and without any URL.
    for (suffix, prefix) in [(None, None), (Some("lan"), None), (None, Some("192.168."))] {
        lab.urls = Urls {
            template: None,
            suffix: suffix.map(|text| text.parse().expect("a suffix")),
            prefix: prefix.map(|text| text.parse().expect("a prefix")),
        };
        lab.start().await;
        let link = CreateAccessLinkRequest {
            id: id.clone(),
            service: "3000".into(),
            ..CreateAccessLinkRequest::default()
        };
        let made = lab.api().create_access_link(link).await.expect("made").into_inner();
        assert_eq!(made.url, "", "{suffix:?} {prefix:?}");
        assert!(!made.credential.is_empty(), "{suffix:?} {prefix:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn port_is_closed_again_if_its_agent_does_not_say_who_reaches_it() {
    let lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    // The agent was replaced by one that knows of no visibility, after it had said that it does.
    let service = HttpService { name: "web".into(), port: 80, ..HttpService::default() };
    let agent = lab.holder(&id);
    let held = agent.living().into_iter().find(|held| held.id == id).expect("held");
    agent.put(Sandbox { services: vec![service], ..held });
    let expose = ExposeHttpServiceRequest {
        id: id.clone(),
        name: "web".into(),
        port: 80,
        ..ExposeHttpServiceRequest::default()
    };
    let answer = lab.api().expose_http_service(expose).await;
    assert_eq!(reason(answer), Reason::VisibilityUnsupported);
    let held = agent.living().into_iter().find(|held| held.id == id).expect("held");
    assert!(held.services.is_empty(), "{held:?}");
}

#[tokio::test(start_paused = true)]
async fn snapshots_are_the_union_over_nodes_and_a_dry_run_changes_nothing() {
    let lab = Lab::new().await;
    lab.agents[1].load(|load| {
        load.snapshots.push("other_v1".into());
        load.snapshot_sizes.push(Size { cpu_cores: 4, memory_mib: 4096, disk_gib: 0 });
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let list = lab.api().list_snapshots(ListSnapshotsRequest {}).await.expect("listed");
    let snapshots = list.into_inner().snapshots;
    let nodes: Vec<_> = snapshots.iter().map(|s| (s.id.as_str(), s.nodes.len())).collect();
    assert_eq!(nodes, [(SNAPSHOT, 3), ("other_v1", 1)]);

    let dry = CreateSandboxRequest { snapshot_id: "other_v1".into(), ..Default::default() };
    let subject = Some(explain_placement_request::Subject::DryRun(dry));
    let answer = lab.api().explain_placement(ExplainPlacementRequest { subject }).await;
    let decision = answer.expect("explained").into_inner().decision.expect("a decision");
    assert_eq!(decision.node, "n2");
    let out: Vec<_> = decision.nodes[1..].iter().map(|verdict| verdict.filtered().name()).collect();
    assert_eq!(out, ["SNAPSHOT_MISSING", "SNAPSHOT_MISSING"]);
    assert!(lab.living().is_empty());
}

/// Makes a gRPC-Web call over the plain channel: base64 is not needed, trailers come in the body.
pub(super) async fn web(
    lab: &Lab,
    token: Option<&str>,
    method: &str,
    message: &impl Message,
) -> (StatusCode, Vec<u8>, Option<String>) {
    let message = message.encode_to_vec();
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len()).expect("small").to_be_bytes());
    frame.extend(message);
    let mut request = HttpRequest::post(format!("http://x/sandbox.v1.SandboxService/{method}"))
        .header("content-type", "application/grpc-web+proto");
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let body = tonic::body::Body::new(Full::new(bytes::Bytes::from(frame)).map_err(|e| match e {}));
    let request = request.body(body).expect("a request");
    let response = lab.channel().oneshot(request).await.expect("an answer");
    let status = response.status();
    let grpc = response.headers().get("grpc-status").map(|v| v.to_str().expect("ascii").to_owned());
    let bytes = response.into_body().collect().await.expect("a body").to_bytes();
    (status, bytes.to_vec(), grpc)
}

#[tokio::test(start_paused = true)]
async fn grpc_web_is_served_on_the_same_port() {
    let lab = Lab::new().await;
    let (status, body, _) =
        web(&lab, Some(&lab.red), "ListSnapshots", &ListSnapshotsRequest {}).await;
    assert_eq!(status, StatusCode::OK);
    assert!(body.windows(SNAPSHOT.len()).any(|part| part == SNAPSHOT.as_bytes()));
    let trailer = String::from_utf8_lossy(&body).into_owned();
    assert!(trailer.contains("grpc-status:0"), "{trailer}");
    let (_, body, grpc) = web(&lab, None, "ListSnapshots", &ListSnapshotsRequest {}).await;
    let told =
        grpc.as_deref() == Some("16") || String::from_utf8_lossy(&body).contains("grpc-status:16");
    assert!(told, "UNAUTHENTICATED");
}

#[tokio::test(start_paused = true)]
async fn compressed_requests_are_accepted_up_to_the_limit_of_a_message() {
    let lab = Lab::new().await;
    let mut api = lab.api().send_compressed(tonic::codec::CompressionEncoding::Gzip);
    let sandbox = create(&mut api, request("r1")).await.expect("made");
    // A thousand times smaller on the wire than what it becomes.
    let content = bytes::Bytes::from(vec![0; 3 << 20]);
    let file = FileContent { path: "/srv/a".into(), content, mode: 0 };
    let write = WriteFilesRequest { id: sandbox.id, files: vec![file], user: String::new() };
    let status = api.write_files(write).await.expect_err("too large");
    assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status:?}");
}
