//! Commands.

use bytes::Bytes;
use futures_util::stream;
use proto::{Reason, sandbox::v1::*};
use tokio_stream::StreamExt;

use super::*;

pub(super) fn argv(id: &str, args: &[&str]) -> ExecStart {
    let args = args.iter().map(ToString::to_string).collect();
    ExecStart {
        id: id.into(),
        command: Some(exec_start::Command::Argv(Argv { args })),
        ..ExecStart::default()
    }
}

pub(super) fn message(message: exec_request::Message) -> ExecRequest {
    ExecRequest { message: Some(message) }
}

pub(super) async fn command(
    lab: &Lab,
    start: ExecStart,
    stdin: Bytes,
) -> Result<ExecCommandResponse, Status> {
    let request = ExecCommandRequest { start: Some(start), stdin };
    lab.api().exec_command(request).await.map(tonic::Response::into_inner)
}

#[tokio::test(start_paused = true)]
async fn command_runs_to_its_end() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let vmid = format!("cmux-{}", sandbox.vmid);
    let answer = command(&lab, argv(&vmid, &["x", "7"]), Bytes::new()).await.expect("ran");
    assert_eq!(answer.exit.expect("exit").code, 7);
    let stdin = Bytes::from(vec![b'z'; 1024 * 1024]);
    let answer = command(&lab, argv(&sandbox.id, &["cat"]), stdin.clone()).await.expect("ran");
    // A little under 1 MiB comes back, and the answer says so.
    assert!(
        answer.truncated && stdin.starts_with(&answer.stdout) && answer.stdout.len() > 1_000_000
    );

    let unknown = command(&lab, argv(&sandbox.id, &["sleep"]), Bytes::new()).await;
    assert_eq!(reason(unknown), Reason::OutcomeUnknown);
    let lost = command(&lab, argv(&sandbox.id, &["vanish"]), Bytes::new()).await;
    assert_eq!(reason(lost), Reason::OutcomeUnknown, "never exit 0");
    for bad in [
        argv(&sandbox.id, &[]),
        argv(&sandbox.id, &["a\0b"]),
        argv("x y", &["true"]),
        ExecStart { command: None, ..argv(&sandbox.id, &[]) },
        ExecStart {
            timeout: Some(prost_types::Duration { seconds: 21, nanos: 0 }),
            ..argv(&sandbox.id, &["true"])
        },
    ] {
        assert_eq!(reason(command(&lab, bad, Bytes::new()).await), Reason::FieldInvalid);
    }
}

#[tokio::test(start_paused = true)]
async fn exec_stream_goes_both_ways_with_heartbeats() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let input = stream::iter([
        message(exec_request::Message::Start(argv(&sandbox.id, &["cat", "3"]))),
        message(exec_request::Message::Stdin(Bytes::from_static(b"hello"))),
        message(exec_request::Message::StdinEof(true)),
    ]);
    let mut output = lab.api().exec(input).await.expect("started").into_inner();
    let mut seen = Vec::new();
    while let Some(message) = output.next().await {
        seen.push(message.expect("no error").message.expect("a message"));
    }
    let [
        exec_response::Message::Started(started),
        exec_response::Message::Stdout(stdout),
        exec_response::Message::Exit(exit),
    ] = seen.as_slice()
    else {
        panic!("{seen:?}")
    };
    assert_eq!((started.boot, stdout.as_ref(), exit.code), (1, &b"hello"[..], 3));

    let start = message(exec_request::Message::Start(argv(&sandbox.id, &["sleep"])));
    let input = stream::iter([start]).chain(stream::pending());
    let mut output = lab.api().exec(input).await.expect("started").into_inner();
    let mut messages = Vec::new();
    for _ in 0..3 {
        let next = tokio::time::timeout(Duration::from_secs(20), output.next()).await;
        messages.push(next.expect("never silent").expect("open").expect("no error").message);
    }
    assert_eq!(messages[2], Some(exec_response::Message::Stdout(Bytes::new())));
    // The node goes down: the stream fails.
    lab.holder(&sandbox.id).down();
    let error = loop {
        match output.next().await.expect("an error comes") {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(daemon::status::reason(&error), Some(Reason::OutcomeUnknown));
}

#[tokio::test(start_paused = true)]
async fn slow_reader_slows_the_command() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let start = message(exec_request::Message::Start(argv(&sandbox.id, &["yes"])));
    let input = stream::iter([start]).chain(stream::pending());
    let mut output = lab.api().exec(input).await.expect("started").into_inner();
    // Nothing is read for long; the flow-control windows bound what is sent ahead.
    tokio::time::sleep(Duration::from_secs(60)).await;
    for _ in 0..100 {
        output.next().await.expect("open").expect("no error");
    }
}

#[tokio::test(start_paused = true)]
async fn stopped_sandbox_runs_no_command() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let id = sandbox.id.clone();
    lab.api()
        .stop_sandbox(StopSandboxRequest { id: id.clone(), grace: None })
        .await
        .expect("stopped");
    let stopped = command(&lab, argv(&id, &["true"]), Bytes::new()).await;
    assert_eq!(reason(stopped), Reason::SandboxNotRunning);
    lab.api().start_sandbox(StartSandboxRequest { id: id.clone() }).await.expect("started");
    command(&lab, argv(&id, &["true"]), Bytes::new()).await.expect("runs again");
    lab.api().delete_sandbox(DeleteSandboxRequest { id: id.clone() }).await.expect("deleted");
    let deleted = command(&lab, argv(&id, &["true"]), Bytes::new()).await;
    assert_eq!(reason(deleted), Reason::SandboxDeleted);
    let foreign = command(&lab, argv("123456", &["true"]), Bytes::new()).await;
    assert_eq!(reason(foreign), Reason::SandboxNotFound);
}

#[tokio::test(start_paused = true)]
async fn exec_stream_must_begin_with_one_start() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let input = stream::iter([message(exec_request::Message::StdinEof(true))]);
    assert_eq!(reason(lab.api().exec(input).await), Reason::FieldInvalid);

    let start = || message(exec_request::Message::Start(argv(&sandbox.id, &["sleep"])));
    let input = stream::iter([start(), start()]).chain(stream::pending());
    let mut output = lab.api().exec(input).await.expect("started").into_inner();
    let error = loop {
        if let Err(error) = output.next().await.expect("an error comes") {
            break error;
        }
    };
    assert_eq!(daemon::status::reason(&error), Some(Reason::FieldInvalid));

    // A message that is too large ends the stream, and does not look like the end of stdin.
    let large = message(exec_request::Message::Stdin(Bytes::from(vec![0; 10 << 20])));
    let start = message(exec_request::Message::Start(argv(&sandbox.id, &["cat"])));
    let input = stream::iter([start, large]).chain(stream::pending());
    let mut output = lab.api().exec(input).await.expect("started").into_inner();
    let error = loop {
        if let Err(error) = output.next().await.expect("an error comes") {
            break error;
        }
    };
    assert_eq!(daemon::status::reason(&error), Some(Reason::TooLarge));
}
