//! Streams that stand still, over the agent's service: how much of what a caller sends this process takes.

use std::sync::atomic::{AtomicU64, Ordering};

use daemon::peer::Peer;
use proto::{agent::v1 as agent, exec::pieces, sandbox::v1 as api};

use super::*;
use crate::rpc::tests::{serve_counted, service};

/// Streams of one sandbox.
const STREAMS: usize = 128;
/// Most bytes towards a command that this process holds of a stream, see docs/connections.md: the window, the rest of
/// a message in it, one message that is queued, one that waits, and one that the shim has not taken.
const HELD: u64 = (64 + 16 + 3 * 64) * 1024;
/// Most bytes of a stream that the shim takes, with the pipe of the command: they are not in the agent's process.
const SHIM: u64 = (256 + 64 + 64) * 1024;

fn request(message: api::exec_request::Message) -> agent::ExecRequest {
    let message = Some(api::ExecRequest { message: Some(message) });
    agent::ExecRequest { message, ..Default::default() }
}

/// Builds the first message of a stream: half of them start a command, and the others attach to these.
fn first(number: usize) -> agent::ExecRequest {
    let (id, exec_id) = (id(1).to_string(), format!("deaf-{}", number % RUNNING_MAX));
    if number >= RUNNING_MAX {
        let attach = api::ExecAttach { id, exec_id, ..Default::default() };
        return request(api::exec_request::Message::Attach(attach));
    }
    let args = ["sleep", "8700"].map(str::to_owned).into();
    let command = Some(api::exec_start::Command::Argv(api::Argv { args }));
    let start = api::ExecStart { id, exec_id, command, ..Default::default() };
    request(api::exec_request::Message::Start(start))
}

#[tokio::test]
async fn stdin_that_no_command_reads_takes_no_more_than_the_queues_of_its_streams() {
    let rig = Rig::new().await;
    let sent = Arc::new(AtomicU64::new(0));
    let client = serve_counted(
        service(&rig.sandboxes, rig.execs.clone()),
        rig.tasks.stopping().clone(),
        (Peer::Controller, Arc::clone(&sent)),
    );
    let mut held = Vec::new();
    for number in 0..STREAMS {
        // As the controller sends what a caller sends in the largest messages.
        let stdin = std::iter::repeat_with(|| pieces(vec![0; 256 * 1024].into())).flatten();
        let stdin = stdin.map(|piece| request(api::exec_request::Message::Stdin(piece)));
        let input = tokio_stream::iter(std::iter::once(first(number)).chain(stdin));
        held.push(client.clone().exec(input).await.expect("it runs"));
    }
    let (begun, mut last) = (Instant::now(), 0);
    loop {
        sleep(Duration::from_millis(500)).await;
        let now = sent.load(Ordering::Relaxed);
        if now == last {
            break;
        }
        assert!(begun.elapsed() < DEADLINE, "{now} bytes and more");
        last = now;
    }
    // Headers of frames and of messages are a small part of it.
    let most = STREAMS as u64 * (HELD + SHIM) / 100 * 101;
    assert!(last <= most, "{last} bytes, over {most}");
    assert!(last >= STREAMS as u64 * 64 * 1024, "each fills its window at least: {last}");
    drop(held);
}
