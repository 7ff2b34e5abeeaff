//! Commands that outlive their callers' streams, and streams that outlive their connections.

use bytes::Bytes;
use futures_util::stream;
use prost::Message as _;
use proto::{Reason, sandbox::v1::*};
use tokio_stream::StreamExt;

use super::{
    api::web,
    exec::{argv, command, message},
    *,
};
use crate::node::fake::counted;

fn named(id: &str, exec_id: &str, args: &[&str]) -> ExecStart {
    ExecStart { exec_id: exec_id.into(), ..argv(id, args) }
}

fn start(start: ExecStart) -> ExecRequest {
    message(exec_request::Message::Start(start))
}

/// Everything that a stream has sent.
#[derive(Debug, Default)]
struct Heard {
    started: Option<ExecStarted>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exits: Vec<u32>,
    error: Option<Reason>,
}

impl Heard {
    async fn of(mut messages: tonic::Streaming<ExecResponse>) -> Self {
        let mut heard = Self::default();
        while let Some(message) = messages.next().await {
            match message {
                Ok(message) => heard.take(message),
                Err(status) => heard.error = daemon::status::reason(&status),
            }
        }
        heard
    }

    fn take(&mut self, message: ExecResponse) {
        match message.message.expect("a message") {
            exec_response::Message::Started(started) => {
                assert!(self.started.replace(started).is_none(), "it starts once");
            }
            exec_response::Message::Stdout(bytes) => self.stdout.extend_from_slice(&bytes),
            exec_response::Message::Stderr(bytes) => self.stderr.extend_from_slice(&bytes),
            exec_response::Message::Exit(exit) => self.exits.push(exit.code),
        }
    }
}

/// Small numbers from a seed.
struct Chance(Seeded);

impl Chance {
    fn new(seed: u64) -> Self {
        Self(Seeded(AtomicU64::new(seed << 32)))
    }

    fn below(&self, end: usize) -> usize {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        usize::try_from(u64::from_le_bytes(bytes) % end as u64).expect("small")
    }
}

#[tokio::test(start_paused = true)]
async fn broken_connections_lose_and_repeat_nothing() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let agent = lab.holder(&sandbox.id).clone();
    for seed in 0..40 {
        let chance = Chance::new(seed);
        let breaks: Vec<_> = (0..chance.below(12))
            .map(|_| u32::try_from(chance.below(25)).expect("small") + u32::from(seed % 2 == 0))
            .collect();
        // A run without an exec_id must have started before the first break.
        let named_run = seed % 2 == 1;
        let exec_id = if named_run { format!("run-{seed}") } else { String::new() };
        agent.break_streams(breaks.clone());
        let bytes = counted(chance.below(1_200_000));
        let mut input = vec![start(named(&sandbox.id, &exec_id, &["cat", "7"]))];
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let (part, after) = rest.split_at(rest.len().min(1 + chance.below(100_000)));
            input.push(message(exec_request::Message::Stdin(Bytes::copy_from_slice(part))));
            rest = after;
        }
        input.push(message(exec_request::Message::StdinEof(true)));
        let before = agent.commands();
        // All connections have noticed the last break, and have recovered.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let controller = lab.controller.as_ref().expect("a controller");
        controller.settled(Duration::from_secs(60)).await;
        let output = lab.api().exec(stream::iter(input).chain(stream::pending())).await;
        let heard = Heard::of(output.expect("started").into_inner()).await;
        let what = format!("seed {seed}, breaks {breaks:?}, error {:?}", heard.error);
        assert_eq!(heard.exits, [7], "{what}");
        assert!(heard.stdout == bytes, "{} of {} bytes; {what}", heard.stdout.len(), bytes.len());
        assert_eq!(agent.commands(), before + 1, "it ran once; {what}");
    }
    agent.break_streams([]);
}

fn stdin(bytes: usize) -> ExecRequest {
    message(exec_request::Message::Stdin(vec![7; bytes].into()))
}

#[tokio::test(start_paused = true)]
async fn stdin_of_nothing_is_not_passed_on_and_large_pieces_are_cut() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let nothing = (0..20).flat_map(|_| [stdin(0), message(exec_request::Message::StdinEof(false))]);
    let input = [start(argv(&sandbox.id, &["cat", "3"]))].into_iter().chain(nothing);
    let input = input.chain([stdin(200_000), message(exec_request::Message::StdinEof(true))]);
    let output = lab.api().exec(stream::iter(input.collect::<Vec<_>>())).await.expect("started");
    let heard = Heard::of(output.into_inner()).await;
    assert_eq!((heard.exits.as_slice(), heard.stdout.len()), (&[3][..], 200_000));
    let sizes = lab.holder(&sandbox.id).stdin_sizes();
    assert_eq!(sizes, [64 * 1024, 64 * 1024, 64 * 1024, 3392]);
}

#[tokio::test(start_paused = true)]
async fn stdin_that_is_kept_stays_within_the_share_of_its_team() {
    const COMMANDS: usize = 40;
    const MIB: usize = 1024 * 1024;
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let red = "red".parse().expect("a team");
    let memory = lab.domain().stdin_memory();
    let mut callers = Vec::new();
    for n in 0..COMMANDS {
        // Takes all of it, and the node never tells that.
        let start = start(named(&sandbox.id, &format!("c{n}"), &["drink"]));
        let input = [start].into_iter().chain((0..4).map(|_| stdin(256 * 1024)));
        // A caller that goes ends its stream, too: to stop reading ends no call.
        let (more, rest) = mpsc::channel(1);
        let input = stream::iter(input.collect::<Vec<_>>()).chain(ReceiverStream::new(rest));
        callers.push((more, lab.api().exec(input).await.expect("started")));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let sent: usize = lab.holder(&sandbox.id).stdin_sizes().iter().sum();
    assert_eq!(sent, COMMANDS * MIB, "it reaches its commands all the same");
    let used = memory.used(&red);
    assert!(used <= 32 * MIB && used > 30 * MIB, "{used}");
    drop(callers);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(memory.used(&red), 0);

    // What the node has told is not kept.
    let input = [start(named(&sandbox.id, "told", &["cat"]))].into_iter();
    let input = input.chain((0..4).map(|_| stdin(256 * 1024))).collect::<Vec<_>>();
    let input = stream::iter(input).chain(stream::pending());
    let mut output = lab.api().exec(input).await.expect("started").into_inner();
    let mut heard = Heard::default();
    while heard.stdout.len() < MIB {
        heard.take(output.next().await.expect("open").expect("no error"));
    }
    assert_eq!(memory.used(&red), 0);
}

#[tokio::test(start_paused = true)]
async fn command_whose_stdin_could_not_be_kept_is_lost_with_its_connection() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let agent = lab.holder(&sandbox.id);
    let red = "red".parse().expect("a team");
    let memory = lab.domain().stdin_memory();
    for (exec_id, is_full) in [("kept", false), ("not-kept", true)] {
        let others = is_full.then(|| memory.take_all(&red));
        let by_others = memory.used(&red);
        // Reads nothing, so most of its stdin is on the way.
        let input = [start(named(&sandbox.id, exec_id, &["sleep"]))].into_iter();
        let input = input.chain((0..4).map(|_| stdin(256 * 1024))).collect::<Vec<_>>();
        let input = stream::iter(input).chain(stream::pending());
        let output = lab.api().exec(input).await.expect("started").into_inner();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(memory.used(&red) > by_others, !is_full);
        lab.net.cut_bulk(agent.name());
        tokio::time::sleep(Duration::from_secs(1)).await;
        if !is_full {
            let (id, exec_id) = (sandbox.id.clone(), exec_id.to_owned());
            let kill = SignalExecRequest { id, exec_id, signal: 9 };
            lab.api().signal_exec(kill).await.expect("signalled");
        }
        let heard = Heard::of(output).await;
        let expected = if is_full { (0, Some(Reason::ExecLost)) } else { (1, None) };
        assert_eq!((heard.exits.len(), heard.error), expected, "{exec_id}");
        drop(others);
    }
}

#[tokio::test(start_paused = true)]
async fn both_outputs_are_complete_over_broken_connections() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let agent = lab.holder(&sandbox.id).clone();
    agent.break_streams([3, 1, 9, 2, 5]);
    let input = stream::iter([start(argv(&sandbox.id, &["count", "500000"]))]);
    let output = lab.api().exec(input.chain(stream::pending())).await.expect("started");
    let heard = Heard::of(output.into_inner()).await;
    let wanted = counted(500_000);
    let errors: Vec<_> =
        wanted.chunks(7001).enumerate().filter(|(n, _)| n % 3 == 0).flat_map(|(_, c)| c).collect();
    assert_eq!((heard.exits.as_slice(), heard.error), (&[5][..], None));
    assert!(heard.stdout == wanted && heard.stderr.iter().eq(errors));
}

#[tokio::test(start_paused = true)]
async fn caller_attaches_where_it_left() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let agent = lab.holder(&sandbox.id).clone();
    let run = || start(named(&sandbox.id, "job-1", &["count", "300000"]));
    let input = stream::iter([run()]).chain(stream::pending());
    let mut output = lab.api().exec(input).await.expect("started").into_inner();
    let mut heard = Heard::default();
    while heard.stdout.len() < 40_000 {
        heard.take(output.next().await.expect("open").expect("no error"));
    }
    drop(output);

    let attach = ExecAttach {
        id: format!("cmux-{}", sandbox.vmid),
        exec_id: "job-1".into(),
        stdout_offset: heard.stdout.len() as u64,
        stderr_offset: heard.stderr.len() as u64,
    };
    let attached = || message(exec_request::Message::Attach(attach.clone()));
    let input = stream::iter([attached()]).chain(stream::pending());
    let output = lab.api().exec(input).await.expect("attached").into_inner();
    let rest = Heard::of(output).await;
    assert_eq!(rest.exits, [5]);
    assert_eq!([heard.stdout.as_slice(), &rest.stdout].concat(), counted(300_000));

    // A repeated start gives the same run, from the beginning.
    let output = lab.api().exec(stream::iter([run()])).await.expect("attached").into_inner();
    let again = Heard::of(output).await;
    assert_eq!((again.exits.as_slice(), again.stdout.len()), (&[5][..], 300_000));
    assert_eq!(agent.commands(), 1);
    let other = start(named(&sandbox.id, "job-1", &["count", "1"]));
    assert_eq!(reason(lab.api().exec(stream::iter([other])).await), Reason::ExecIdReused);

    let missing = ExecAttach { exec_id: "job-2".into(), ..attach.clone() };
    let missing = message(exec_request::Message::Attach(missing));
    assert_eq!(reason(lab.api().exec(stream::iter([missing])).await), Reason::ExecNotFound);
    let blue = token(&lab.store, "blue", "sandbox").await;
    let foreign = lab.api_as(&blue).exec(stream::iter([attached()])).await;
    assert_eq!(reason(foreign), Reason::SandboxNotFound);
    let id = sandbox.id.clone();
    lab.api()
        .stop_sandbox(StopSandboxRequest { id: id.clone(), grace: None })
        .await
        .expect("stopped");
    lab.api().start_sandbox(StartSandboxRequest { id }).await.expect("started");
    assert_eq!(reason(lab.api().exec(stream::iter([attached()])).await), Reason::ExecLost);
    assert_eq!(reason(lab.api().exec(stream::iter([run()])).await), Reason::ExecLost);
    assert_eq!(agent.commands(), 1, "never a second run");
}

#[tokio::test(start_paused = true)]
async fn command_that_cannot_continue_says_so() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let agent = lab.holder(&sandbox.id).clone();
    // The first answer is lost: a run with an exec_id is asked for again; one without may have run.
    agent.break_streams([0]);
    let once = lab.api().exec(stream::iter([start(argv(&sandbox.id, &["x", "3"]))])).await;
    assert_eq!((reason(once), agent.commands()), (Reason::OutcomeUnknown, 1));
    lab.controller.as_ref().expect("a controller").settled(Duration::from_secs(60)).await;
    agent.break_streams([0, 0, 0]);
    let run = start(named(&sandbox.id, "n", &["x", "3"]));
    let heard =
        Heard::of(lab.api().exec(stream::iter([run])).await.expect("ok").into_inner()).await;
    assert_eq!((heard.exits.as_slice(), agent.commands()), (&[3][..], 2));

    // Away for longer than any wait; the caller gets heartbeats all the while.
    let run = start(named(&sandbox.id, "long", &["sleep"]));
    let input = stream::iter([run]).chain(stream::pending());
    let mut output = lab.api().exec(input).await.expect("started").into_inner();
    output.next().await.expect("open").expect("started");
    agent.down();
    let since = tokio::time::Instant::now();
    let error = loop {
        let next = tokio::time::timeout(Duration::from_secs(20), output.next()).await;
        if let Err(error) = next.expect("never silent").expect("an error comes") {
            break error;
        }
    };
    assert_eq!(daemon::status::reason(&error), Some(Reason::OutcomeUnknown));
    assert!((60..70).contains(&since.elapsed().as_secs()), "{:?}", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn missing_output_after_a_break_is_not_the_end_of_the_command() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let agent = lab.holder(&sandbox.id).clone();
    agent.break_streams([20]);
    let run = start(named(&sandbox.id, "long", &["count", "3000000"]));
    let output = lab.api().exec(stream::iter([run])).await.expect("started").into_inner();
    agent.faults(|faults| faults.forgets_output = true);
    let heard = Heard::of(output).await;
    assert_eq!((heard.exits.as_slice(), heard.error), (&[][..], Some(Reason::OutcomeUnknown)));
    assert!(!heard.stdout.is_empty() && heard.stdout.len() < 3_000_000, "{}", heard.stdout.len());
}

#[tokio::test(start_paused = true)]
async fn named_command_is_awaited_over_several_calls() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let agent = lab.holder(&sandbox.id).clone();
    let hour = Some(prost_types::Duration { seconds: 3600, nanos: 0 });
    let run = ExecStart { timeout: hour, ..named(&sandbox.id, "build", &["sleep"]) };
    for _ in 0..2 {
        let since = tokio::time::Instant::now();
        let answer = command(&lab, run.clone(), Bytes::new()).await.expect("an answer");
        assert!(answer.still_running && answer.exit.is_none(), "{answer:?}");
        assert_eq!(answer.exec_id, "build");
        assert!(since.elapsed() < Duration::from_secs(20));
    }
    let signal = SignalExecRequest { id: sandbox.id.clone(), exec_id: "build".into(), signal: 15 };
    lab.api().signal_exec(signal).await.expect("signalled");
    let answer = command(&lab, run, Bytes::new()).await.expect("an answer");
    assert_eq!((answer.still_running, answer.exit.expect("ended").signal), (false, 15));
    assert_eq!(agent.commands(), 1);

    // All of stdin once, however often it is sent, and all of the output from the beginning.
    let stdin = Bytes::from(counted(900_000));
    let cat = named(&sandbox.id, "cat", &["cat", "4"]);
    agent.break_streams([5, 20]);
    for _ in 0..2 {
        let answer = command(&lab, cat.clone(), stdin.clone()).await.expect("an answer");
        assert_eq!(answer.exit.expect("ended").code, 4);
        assert!(answer.stdout == stdin && !answer.truncated, "{}", answer.stdout.len());
    }
    let plain = command(&lab, argv(&sandbox.id, &["x", "1"]), Bytes::new()).await.expect("ran");
    assert!(!plain.exec_id.is_empty() && !plain.still_running);
}

#[tokio::test(start_paused = true)]
async fn commands_are_listed_and_acted_on() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let run = start(named(&sandbox.id, "shell", &["cat"]));
    let input = stream::iter([run]).chain(stream::pending());
    let _output = lab.api().exec(input).await.expect("started").into_inner();
    let list = ListExecsRequest { id: sandbox.vmid.to_string(), ..Default::default() };
    let execs = lab.api().list_execs(list).await.expect("listed").into_inner().execs;
    let names: Vec<_> = execs.iter().map(|exec| (exec.exec_id.as_str(), exec.exit)).collect();
    assert_eq!(names, [("shell", None)]);

    let (id, exec_id) = (sandbox.id.clone(), "shell".to_owned());
    let window = Some(WindowSize { rows: 30, cols: 100 });
    let resize = ResizeExecRequest { id: id.clone(), exec_id: exec_id.clone(), window };
    lab.api().resize_exec(resize.clone()).await.expect("resized");
    let write = |offset, data: &'static [u8]| WriteExecStdinRequest {
        id: id.clone(),
        exec_id: exec_id.clone(),
        offset,
        data: Bytes::from_static(data),
        eof: false,
    };
    for _ in 0..2 {
        let taken = lab.api().write_exec_stdin(write(0, b"abc")).await.expect("taken");
        assert_eq!(taken.into_inner().offset, 3, "a repeated call gives nothing twice");
    }
    let gap = lab.api().write_exec_stdin(write(7, b"abc")).await;
    assert_eq!(reason(gap), Reason::FieldInvalid);

    let none = ResizeExecRequest { window: None, ..resize.clone() };
    assert_eq!(reason(lab.api().resize_exec(none).await), Reason::FieldInvalid);
    let signal = SignalExecRequest { id: id.clone(), exec_id: exec_id.clone(), signal: 0 };
    assert_eq!(reason(lab.api().signal_exec(signal.clone()).await), Reason::FieldInvalid);
    let unknown = SignalExecRequest { exec_id: "other".into(), signal: 9, ..signal };
    assert_eq!(reason(lab.api().signal_exec(unknown).await), Reason::ExecNotFound);
    let blue = token(&lab.store, "blue", "sandbox").await;
    let foreign = lab.api_as(&blue).resize_exec(resize).await;
    assert_eq!(reason(foreign), Reason::SandboxNotFound);
    let foreign = lab.api_as(&blue).list_execs(ListExecsRequest { id, ..Default::default() }).await;
    assert_eq!(reason(foreign), Reason::SandboxNotFound);
}

/// Returns the messages of a gRPC-Web body, without its trailers.
fn frames(mut body: &[u8]) -> Vec<ExecResponse> {
    let mut messages = Vec::new();
    while let [kind, a, b, c, d, rest @ ..] = body {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        if *kind == 0 {
            let message = StreamExecResponse::decode(&rest[..length]).expect("a message");
            messages.extend(message.message);
        }
        body = &rest[length..];
    }
    messages
}

#[tokio::test(start_paused = true)]
async fn grpc_web_streams_output_and_writes_stdin() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let run = named(&sandbox.id, "web", &["cat", "6"]);
    let request = StreamExecRequest {
        subject: Some(stream_exec_request::Subject::Start(run.clone())),
        no_stdin: false,
    };
    let write = WriteExecStdinRequest {
        id: sandbox.id.clone(),
        exec_id: "web".into(),
        offset: 0,
        data: Bytes::from_static(b"over the web"),
        eof: true,
    };
    let streamed = web(&lab, Some(&lab.red), "StreamExec", &request);
    let written = async {
        let list = ListExecsRequest { id: sandbox.id.clone(), ..Default::default() };
        while lab.api().list_execs(list.clone()).await.expect("listed").get_ref().execs.is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        web(&lab, Some(&lab.red), "WriteExecStdin", &write).await
    };
    let ((_, body, _), (_, answer, _)) = tokio::join!(streamed, written);
    assert!(String::from_utf8_lossy(&answer).contains("grpc-status:0"));
    let mut heard = Heard::default();
    frames(&body).into_iter().for_each(|message| heard.take(message));
    assert_eq!((heard.stdout.as_slice(), heard.exits), (&b"over the web"[..], vec![6]));

    // Without an exec_id stdin could never come.
    let nameless = ExecStart { exec_id: String::new(), ..run };
    let subject = Some(stream_exec_request::Subject::Start(nameless));
    let request = StreamExecRequest { subject, no_stdin: true };
    assert_eq!(reason(lab.api().stream_exec(request).await), Reason::FieldInvalid);
    let quiet = named(&sandbox.id, "quiet", &["cat", "2"]);
    let subject = Some(stream_exec_request::Subject::Start(quiet));
    let request = StreamExecRequest { subject, no_stdin: true };
    let mut output = lab.api().stream_exec(request).await.expect("started").into_inner();
    let mut heard = Heard::default();
    while let Some(message) = output.next().await {
        heard.take(message.expect("no error").message.expect("a message"));
    }
    assert_eq!(heard.exits, [2], "stdin was at its end from the beginning");
    assert_eq!(heard.started.expect("told").exec_id, "quiet");
}
