//! Calls that a tenant makes last: they take their team's share of the one connection for such calls to a node, and
//! nothing of what the other teams and the node itself need.

use bytes::Bytes;
use futures_util::stream;
use proto::{Reason, sandbox::v1::*};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_stream::StreamExt as _;

use super::{
    exec::{argv, message},
    *,
};
use crate::node::{Origin, StreamOwner, calls::Call};

/// Longest time for a call beside them.
const LIMIT: Duration = Duration::from_secs(2);
/// Share of a team that is alone: half of the places for calls of callers.
const SHARE: usize = 128;
/// Share of a team that is alone: half of the streams of a node.
const STREAMS: usize = 320;

async fn on_n1(api: &mut Api, request_id: &str) -> String {
    let request = CreateSandboxRequest { node: "n1".into(), ..request(request_id) };
    create(api, request).await.expect("made").id
}

#[tokio::test(start_paused = true)]
async fn slow_calls_of_a_team_hold_up_no_other_team_and_none_of_its_creations() {
    let lab = Lab::new().await;
    let blue = token(&lab.store, "blue", "sandbox").await;
    let mut ids = Vec::new();
    for n in 0..8 {
        ids.push(on_n1(&mut lab.api(), &format!("r{n}")).await);
    }
    let theirs = on_n1(&mut lab.api_as(&blue), "b1").await;
    lab.agents[0].faults(|faults| faults.unanswered = Some(Call::ControlExec));
    // As many as the connection has streams, and as many of each sandbox as its agent takes.
    let (mut slow, channel) = (JoinSet::new(), lab.channel());
    for n in 0..512 {
        let mut api: Api =
            SandboxServiceClient::with_interceptor(channel.clone(), bearer(&lab.red));
        let request = WriteExecStdinRequest {
            id: ids[n % ids.len()].clone(),
            exec_id: "run".into(),
            data: Bytes::from_static(b"x"),
            ..WriteExecStdinRequest::default()
        };
        slow.spawn(async move { api.write_exec_stdin(request).await });
    }
    sleep(Duration::from_secs(1)).await;
    assert_eq!(lab.agents[0].swallowed(), SHARE);
    let mut refused = 0;
    while let Some(answer) = slow.try_join_next() {
        let status = answer.expect("no panic").expect_err("it is one too many");
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert!(daemon::status::retry_after(&status).is_some(), "{status:?}");
        assert_eq!(reason(Err::<(), _>(status)), Reason::TooManyCalls);
        refused += 1;
    }
    assert_eq!((refused, slow.len()), (512 - SHARE, SHARE));

    let beside = async {
        let mut api = lab.api_as(&blue);
        let pause = PauseSandboxRequest { id: theirs.clone(), or_stop: false };
        api.pause_sandbox(pause).await.expect("paused");
        on_n1(&mut api, "b2").await;
        api.delete_sandbox(DeleteSandboxRequest { id: theirs.clone() }).await.expect("deleted");
        // What the controller does for the team itself has places of its own.
        on_n1(&mut lab.api(), "r8").await;
    };
    timeout(LIMIT, beside).await.expect("nothing waits for them");
    for node in lab.domain().nodes().statuses() {
        assert_eq!(node.not_ready, None, "{}", node.name);
    }
    let own = lab.api().stop_sandbox(StopSandboxRequest { id: ids[0].clone(), grace: None }).await;
    assert_eq!(reason(own), Reason::TooManyCalls, "it is their team's own share");

    // They end, and give their places back.
    while let Some(answer) = slow.join_next().await {
        assert_eq!(reason(answer.expect("no panic")), Reason::OutcomeUnknown);
    }
    let stop = StopSandboxRequest { id: ids[0].clone(), grace: None };
    lab.api().stop_sandbox(stop).await.expect("there is room again");
}

#[tokio::test(start_paused = true)]
async fn change_counts_as_a_call_until_its_end_though_its_caller_hangs_up() {
    let mut lab = Lab::new().await;
    lab.limits.team_calls_max = Some(2);
    lab.start().await;
    let id = on_n1(&mut lab.api(), "r1").await;
    lab.agents[0].faults(|faults| faults.unanswered = Some(Call::StopSandbox));
    for _ in 0..2 {
        let mut api = lab.api();
        let stop = api.stop_sandbox(StopSandboxRequest { id: id.clone(), grace: None });
        timeout(Duration::from_secs(1), stop).await.expect_err("its node does not answer");
    }
    assert_eq!(reason(lab.get(&id).await), Reason::TooManyCalls);
    sleep(Duration::from_mins(1)).await;
    lab.get(&id).await.expect("both have ended");
}

#[tokio::test(start_paused = true)]
async fn usage_is_refused_and_not_left_out_when_the_share_is_used_up() {
    let lab = Lab::new().await;
    let id = on_n1(&mut lab.api(), "r1").await;
    let node = lab.domain().nodes().get(lab.agents[0].name()).expect("known");
    let red = "red".parse().expect("a team");
    let held: Vec<_> =
        std::iter::from_fn(|| node.client.calls(Origin::Caller, &red).ok()).collect();
    assert_eq!(held.len(), SHARE);
    let asked = || GetUsageRequest { ids: vec![id.clone()], ..GetUsageRequest::default() };
    assert_eq!(reason(lab.api().get_usage(asked()).await), Reason::TooManyCalls);
    drop(held);
    lab.api().get_usage(asked()).await.expect("there is room again");
}

#[tokio::test(start_paused = true)]
async fn creations_go_on_without_a_place_to_wait_at_their_node() {
    let lab = Lab::new().await;
    let node = lab.domain().nodes().get(lab.agents[0].name()).expect("known");
    let red = "red".parse().expect("a team");
    let held: Vec<_> =
        std::iter::from_fn(|| node.client.calls(Origin::Creation, &red).ok()).collect();
    assert!(!held.is_empty());
    lab.agents[0].faults(|faults| faults.boot = Duration::from_secs(10));
    on_n1(&mut lab.api(), "r1").await;
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn streams_that_are_left_all_at_once_hold_up_no_call() {
    let lab = Lab::new().await;
    let (nodes, mut left) = (lab.domain().nodes(), Vec::new());
    let node = nodes.get(lab.agents[0].name()).expect("known");
    let mut ids = Vec::new();
    for n in 0..4 {
        ids.push(on_n1(&mut lab.api(), &format!("r{n}")).await);
    }
    for n in 0..STREAMS {
        let id = &ids[n % ids.len()];
        let start = message(exec_request::Message::Start(argv(id, &["sleep"])));
        let zeros = stream::repeat(Bytes::from(vec![0; 64 * 1024]));
        let zeros = zeros.map(|bytes| message(exec_request::Message::Stdin(bytes)));
        let sandbox = id.parse().expect("an id");
        let owner = StreamOwner { team: "red".parse().expect("a team"), sandbox };
        let input = stream::iter([start]).chain(zeros);
        left.push(node.client.exec(nodes.epoch.get(), &owner, input).await.expect("started"));
    }
    sleep(Duration::from_secs(1)).await;
    lab.agents[0].faults(|faults| faults.unanswered = Some(Call::ControlExec));
    drop(left);
    // Each of them is hung up by a call, none of which is answered.
    sleep(Duration::from_secs(2)).await;
    assert_eq!(lab.agents[0].swallowed(), STREAMS);
    timeout(LIMIT, node.client.hello(0)).await.expect("in time").expect("an answer");
    let blue = token(&lab.store, "blue", "sandbox").await;
    timeout(LIMIT, on_n1(&mut lab.api_as(&blue), "b1")).await.expect("in time");
}
