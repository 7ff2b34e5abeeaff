//! Limits of teams beyond creations: commands, their output, streams, events and changes.

use bytes::Bytes;
use futures_util::stream;
use proto::{Reason, limits::TeamLimits, sandbox::v1::*};
use tokio_stream::StreamExt;
use tonic::Streaming;

use super::{
    exec::{argv, command, message},
    quotas::{exceeded, text},
    *,
};

fn named(id: &str, exec_id: &str, args: &[&str]) -> ExecStart {
    ExecStart { exec_id: exec_id.into(), ..argv(id, args) }
}

impl Lab {
    /// Starts a command and stays attached.
    async fn run(&self, start: ExecStart) -> Result<Streaming<StreamExecResponse>, Status> {
        let subject = Some(stream_exec_request::Subject::Start(start));
        let request = StreamExecRequest { subject, no_stdin: true };
        Ok(self.api().stream_exec(request).await?.into_inner())
    }

    async fn kill(&self, id: &str, exec_id: &str) {
        let (id, exec_id) = (id.into(), exec_id.into());
        let request = SignalExecRequest { id, exec_id, signal: 9 };
        self.api().signal_exec(request).await.expect("signalled");
    }

    /// Waits until so many commands of the team count as running.
    async fn until_running(&self, count: u64) {
        for _ in 0..60 {
            if self.usage("red").await.running_execs == count {
                return;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        panic!("{:?}, not {count}", self.usage("red").await);
    }

    /// Compares the sums of commands with a recount.
    fn recounted(&self) {
        assert_eq!(self.domain().nodes().commands.miscounted(), []);
    }
}

async fn ended(mut stream: Streaming<StreamExecResponse>) -> ExecExit {
    loop {
        let message = stream.next().await.expect("an exit").expect("no error").message;
        let message = message.and_then(|message| message.message);
        if let Some(exec_response::Message::Exit(exit)) = message {
            return exit;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn of_many_parallel_commands_as_many_start_as_the_rate_allows() {
    let mut lab = Lab::limited("execs=4/1m").await;
    let id = lab.create("r1").await.expect("made").id;
    let calls = (0..12).map(|_| command(&lab, argv(&id, &["x", "0"]), Bytes::new()));
    let answers = futures_util::future::join_all(calls).await;
    let refused: Vec<_> = answers.into_iter().filter_map(Result::err).collect();
    assert_eq!((refused.len(), lab.holder(&id).commands()), (8, 4));
    for status in &refused {
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert_eq!(daemon::status::reason(status), Some(Reason::RateExceeded));
        assert_eq!(exceeded(status), text("execs", 4, 4));
        let wait = daemon::status::retry_after(status).expect("a hint");
        assert!(wait <= Duration::from_mins(1) && wait > Duration::from_secs(55), "{wait:?}");
        assert!(status.metadata().get("retry-after").is_some(), "{status:?}");
    }
    assert_eq!(lab.usage("red").await.execs, 4);
    // Another team has its own rate.
    let blue = token(&lab.store, "blue", "sandbox").await;
    let theirs = create(&mut lab.api_as(&blue), request("r1")).await.expect("made").id;
    let start = Some(argv(&theirs, &["x", "0"]));
    let request = ExecCommandRequest { start, stdin: Bytes::new() };
    lab.api_as(&blue).exec_command(request).await.expect("another team");
    tokio::time::sleep(Duration::from_mins(1)).await;
    command(&lab, argv(&id, &["x", "0"]), Bytes::new()).await.expect("a minute later");
    assert_eq!(lab.usage("red").await.execs, 1);
    // The window begins anew with the controller.
    lab.start().await;
    assert_eq!(lab.usage("red").await.execs, 0);
    lab.recounted();
}

#[tokio::test(start_paused = true)]
async fn repeated_start_of_a_command_does_not_count() {
    let lab = Lab::limited("execs=2/1m running_execs=2").await;
    let id = lab.create("r1").await.expect("made").id;
    let short = || named(&id, "short", &["x", "3"]);
    let long = || named(&id, "long", &["sleep"]);
    let first = command(&lab, short(), Bytes::new()).await.expect("ran");
    let held = lab.run(long()).await.expect("runs");
    assert_eq!(reason(lab.run(named(&id, "more", &["x"])).await), Reason::RateExceeded);
    for _ in 0..5 {
        let again = command(&lab, short(), Bytes::new()).await.expect("the same");
        assert_eq!((again.exit, again.exec_id), (first.exit, first.exec_id.clone()));
        drop(lab.run(long()).await.expect("the same, which runs"));
    }
    let usage = lab.usage("red").await;
    assert_eq!((usage.execs, usage.running_execs), (2, 1));
    assert_eq!(lab.holder(&id).commands(), 2);
    lab.kill(&id, "long").await;
    assert_eq!(ended(held).await.signal, 9);
    lab.until_running(0).await;
    lab.recounted();
}

#[tokio::test(start_paused = true)]
async fn command_that_was_refused_does_not_count() {
    let lab = Lab::limited("execs=1/1m running_execs=1").await;
    let id = lab.create("r1").await.expect("made").id;
    lab.api()
        .stop_sandbox(StopSandboxRequest { id: id.clone(), grace: None })
        .await
        .expect("stopped");
    for exec_id in ["", "a", "a"] {
        let refused = lab.run(ExecStart { exec_id: exec_id.into(), ..named(&id, "", &["x"]) });
        let wanted = if exec_id.is_empty() { "FieldInvalid" } else { "SandboxNotRunning" };
        assert_eq!(format!("{:?}", reason(refused.await)), wanted);
    }
    let usage = lab.usage("red").await;
    assert_eq!((usage.execs, usage.running_execs), (0, 0));
    lab.recounted();
}

#[tokio::test(start_paused = true)]
async fn start_counts_whose_caller_hangs_up_before_the_answer() {
    for exec_id in ["a", ""] {
        let lab = Lab::limited("execs=1/1m").await;
        let id = lab.create("r1").await.expect("made").id;
        let holder = lab.holder(&id);
        holder.faults(|faults| faults.mute_execs = true);
        let start = message(exec_request::Message::Start(named(&id, exec_id, &["sleep"])));
        let mut api = lab.api();
        let call = api.exec(stream::iter([start]).chain(stream::pending()));
        tokio::time::timeout(Duration::from_secs(1), call).await.map(drop).expect_err("no answer");
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(holder.commands(), 1, "it runs all the same");
        holder.faults(|faults| faults.mute_execs = false);
        assert_eq!(lab.usage("red").await.execs, 1, "{exec_id:?}");
        assert_eq!(reason(lab.run(named(&id, "b", &["sleep"])).await), Reason::RateExceeded);
        // The one with a name is known by it.
        let running = u64::from(!exec_id.is_empty());
        assert_eq!(lab.usage("red").await.running_execs, running);
        lab.recounted();
    }
}

#[tokio::test(start_paused = true)]
async fn no_more_commands_run_than_the_team_may_have() {
    let mut lab = Lab::limited("running_execs=3").await;
    let id = lab.create("r1").await.expect("made").id;
    let names: Vec<_> = (0..10).map(|n| format!("c{n}")).collect();
    let calls = names.iter().map(|name| lab.run(named(&id, name, &["sleep"])));
    let answers = futures_util::future::join_all(calls).await;
    let (mut streams, mut refused) = (Vec::new(), Vec::new());
    for (name, answer) in names.iter().zip(answers) {
        match answer {
            Ok(stream) => streams.push((name.clone(), stream)),
            Err(status) => refused.push(status),
        }
    }
    assert_eq!((streams.len(), refused.len()), (3, 7));
    for status in &refused {
        assert_eq!(daemon::status::reason(status), Some(Reason::QuotaExceeded));
        assert_eq!(exceeded(status), text("running_execs", 3, 3));
        assert_eq!(daemon::status::retry_after(status), Some(Duration::from_secs(5)));
        assert_eq!(status.metadata().get("retry-after").expect("a header"), "5");
    }
    // The end that a caller sees makes room at once.
    let (name, stream) = streams.pop().expect("three");
    lab.kill(&id, &name).await;
    ended(stream).await;
    lab.until_running(2).await;
    let stream = lab.run(named(&id, "next", &["sleep"])).await.expect("there is room");
    // Without their callers they run on and count, also after a restart of the controller.
    drop((stream, streams));
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(reason(lab.run(named(&id, "d", &["sleep"])).await), Reason::QuotaExceeded);
    lab.start().await;
    assert_eq!(reason(lab.run(named(&id, "d", &["sleep"])).await), Reason::QuotaExceeded);
    lab.run(named(&id, "next", &["sleep"])).await.expect("it runs already");
    // The node tells that one has ended which nobody watched.
    lab.kill(&id, "next").await;
    lab.until_running(2).await;
    let held = lab.run(named(&id, "d", &["sleep"])).await.expect("there is room");
    lab.recounted();
    // With the sandbox go its commands.
    lab.api().delete_sandbox(DeleteSandboxRequest { id }).await.expect("deleted");
    drop(held);
    lab.until_running(0).await;
    lab.recounted();
}

#[tokio::test(start_paused = true)]
async fn commands_of_a_node_that_reports_none_count_while_they_have_a_caller() {
    let mut lab = Lab::limited("running_execs=1").await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.tells_no_commands = true);
    }
    lab.start().await;
    tokio::time::sleep(Duration::from_secs(20)).await;
    let id = lab.create("r1").await.expect("made").id;
    let stream = lab.run(named(&id, "a", &["sleep"])).await.expect("runs");
    assert_eq!(reason(lab.run(named(&id, "b", &["sleep"])).await), Reason::QuotaExceeded);
    drop(stream);
    lab.until_running(0).await;
    drop(lab.run(named(&id, "b", &["sleep"])).await.expect("there is room"));
    lab.recounted();
}

#[tokio::test(start_paused = true)]
async fn team_with_too_much_kept_output_starts_nothing() {
    let mut lab = Lab::limited("output_mib=10").await;
    let one = lab.create("r1").await.expect("made").id;
    let two = lab.create("r2").await.expect("made").id;
    let blue = token(&lab.store, "blue", "sandbox").await;
    let theirs = create(&mut lab.api_as(&blue), request("r1")).await.expect("made").id;
    lab.holder(&theirs).keeps(&theirs, 900 << 20);
    lab.holder(&one).keeps(&one, 4 << 20);
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(lab.usage("red").await.output_mib, 4);
    command(&lab, argv(&one, &["x"]), Bytes::new()).await.expect("another team's does not count");
    lab.holder(&two).keeps(&two, (6 << 20) + 1);
    tokio::time::sleep(Duration::from_secs(10)).await;
    for restart in [false, true] {
        if restart {
            lab.start().await;
        }
        let refused = command(&lab, argv(&one, &["x"]), Bytes::new()).await.expect_err("too much");
        assert_eq!(daemon::status::reason(&refused), Some(Reason::QuotaExceeded));
        assert_eq!(exceeded(&refused), text("output_mib", 11, 10));
        assert!(refused.message().contains("delete or stop sandboxes"), "{refused:?}");
    }
    lab.recounted();
    lab.api().delete_sandbox(DeleteSandboxRequest { id: two }).await.expect("deleted");
    tokio::time::sleep(Duration::from_secs(10)).await;
    command(&lab, argv(&one, &["x"]), Bytes::new()).await.expect("there is room");
    lab.set_limits("red", "output_mib=4", &["limits.output_mib"]).await.expect("lowered");
    let refused = command(&lab, argv(&one, &["x"]), Bytes::new()).await;
    assert_eq!(reason(refused), Reason::QuotaExceeded);
    lab.recounted();
}

#[tokio::test(start_paused = true)]
async fn team_has_as_many_streams_as_its_own_limit_says() {
    let lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    let effective = |team: Team| team.effective.and_then(|limits| limits.streams);
    let most = effective(lab.team("red").await).expect("the configuration's");
    assert_eq!(most, Limit { max: 4096, unlimited: false });
    lab.set_limits("red", "streams=3", &["limits.streams"]).await.expect("set");
    let mut api = lab.api();
    let mut watches = Vec::new();
    for _ in 0..3 {
        let request = WatchSandboxRequest { id: id.clone() };
        watches.push(api.watch_sandbox(request).await.expect("within the limit").into_inner());
    }
    let status = api.watch_sandbox(WatchSandboxRequest { id }).await.expect_err("too many");
    assert_eq!(status.code(), tonic::Code::ResourceExhausted);
    assert_eq!(daemon::status::reason(&status), Some(Reason::TooManyCalls));
    assert_eq!(exceeded(&status), text("streams", 3, 3));
    assert!(daemon::status::retry_after(&status).is_some(), "{status:?}");
    assert_eq!(lab.usage("red").await.streams, 3);
    assert_eq!(lab.usage("blue").await.streams, 0);
}

#[tokio::test(start_paused = true)]
async fn changes_of_sandboxes_have_a_rate_and_deletions_have_none() {
    let lab = Lab::limited("changes=3/1m").await;
    let id = lab.create("r1").await.expect("made").id;
    let expose = |port| {
        let mut api = lab.api();
        let request =
            ExposeHttpServiceRequest { id: id.clone(), name: String::new(), port, visibility: 0 };
        async move { api.expose_http_service(request).await.map(drop) }
    };
    let calls = futures_util::future::join_all((8000..8010).map(expose));
    let refused: Vec<_> = calls.await.into_iter().filter_map(Result::err).collect();
    assert_eq!(refused.len(), 7);
    for status in &refused {
        assert_eq!(daemon::status::reason(status), Some(Reason::RateExceeded));
        assert_eq!(exceeded(status), text("changes", 3, 3));
        assert!(daemon::status::retry_after(status).is_some(), "{status:?}");
    }
    // What only ends or closes something counts and is not refused; what its node refuses does not count.
    let hide = HideHttpServiceRequest { id: id.clone(), name: "none".into() };
    assert_eq!(reason(lab.api().hide_http_service(hide).await), Reason::ServiceNotFound);
    assert_eq!(lab.usage("red").await.changes, 3);
    let pause = PauseSandboxRequest { id: id.clone(), or_stop: false };
    lab.api().pause_sandbox(pause).await.expect("never refused");
    assert_eq!(lab.usage("red").await.changes, 4);
    let resume = ResumeSandboxRequest { id: id.clone() };
    assert_eq!(reason(lab.api().resume_sandbox(resume.clone()).await), Reason::RateExceeded);
    tokio::time::sleep(Duration::from_mins(1)).await;
    lab.api().resume_sandbox(resume).await.expect("a minute later");
    lab.set_limits("red", "changes=0/day", &["limits.changes"]).await.expect("none");
    lab.api().delete_sandbox(DeleteSandboxRequest { id }).await.expect("never refused");
}

#[tokio::test(start_paused = true)]
async fn team_keeps_as_many_events_as_its_limit_says() {
    let mut lab = Lab::limited("events=6").await;
    let id = lab.create("r1").await.expect("made").id;
    let blue = token(&lab.store, "blue", "sandbox").await;
    lab.store
        .put_team_limits(&"blue".parse().expect("team"), TeamLimits::stored("events=none"))
        .await
        .expect("stored");
    lab.start().await;
    let theirs = create(&mut lab.api_as(&blue), request("r1")).await.expect("made").id;
    for n in 0..10 {
        for (token, id) in [(&lab.red, &id), (&blue, &theirs)] {
            let port = 8000 + n;
            let request = ExposeHttpServiceRequest {
                id: id.clone(),
                name: String::new(),
                port,
                visibility: 0,
            };
            lab.api_as(token).expose_http_service(request).await.expect("exposed");
        }
    }
    assert!(lab.usage("red").await.events > 6);
    let before = lab.usage("blue").await.events;
    tokio::time::sleep(Duration::from_secs(700)).await;
    assert_eq!(lab.usage("red").await.events, 6);
    assert_eq!(lab.usage("blue").await.events, before);
    let teams = lab.operator().list_teams(ListTeamsRequest::default()).await.expect("teams");
    let kept: Vec<_> = teams
        .into_inner()
        .teams
        .into_iter()
        .map(|team| (team.name, team.usage.unwrap_or_default().events))
        .collect();
    assert_eq!(kept, [("blue".to_owned(), before), ("red".to_owned(), 6)]);
    lab.domain().nodes().log.flushed().await.expect("written");
}

/// The limits of commands hold over any sequence of starts, ends, hang-ups and restarts.
#[tokio::test(start_paused = true)]
async fn counters_of_commands_equal_a_recount_after_any_sequence() {
    for seed in 1..=4_u64 {
        let mut lab = Lab::limited("running_execs=4").await;
        let ids =
            [lab.create("r1").await.expect("made").id, lab.create("r2").await.expect("made").id];
        let random = Seeded(AtomicU64::new(seed * 104_729));
        let draw = |below: usize| {
            let mut bytes = [0; 4];
            random.fill(&mut bytes);
            usize::try_from(u32::from_le_bytes(bytes)).expect("fits") % below
        };
        let mut held = Vec::new();
        for step in 0..40 {
            let (id, name) = (&ids[draw(2)], format!("e{}", draw(6)));
            match draw(7) {
                0..=2 => {
                    if let Ok(stream) = lab.run(named(id, &name, &["sleep"])).await {
                        held.push(stream);
                    }
                }
                3 if !held.is_empty() => drop(held.swap_remove(draw(held.len()))),
                4 => {
                    let request = SignalExecRequest { id: id.clone(), exec_id: name, signal: 9 };
                    // There may be no such command.
                    lab.api().signal_exec(request).await.ok();
                }
                5 => tokio::time::sleep(Duration::from_secs(draw(12) as u64)).await,
                6 if draw(3) == 0 => {
                    held.clear();
                    lab.start().await;
                }
                _ => {}
            }
            lab.recounted();
            let running = lab.usage("red").await.running_execs;
            assert!(running <= 4, "seed {seed}, step {step}: {running}");
        }
        held.clear();
        // What runs on the nodes is what counts, once they have reported.
        tokio::time::sleep(Duration::from_secs(30)).await;
        let mut there = 0;
        for id in &ids {
            let request = ListExecsRequest { id: id.clone(), ..ListExecsRequest::default() };
            let execs = lab.api().list_execs(request).await.expect("a list").into_inner().execs;
            there += execs.iter().filter(|exec| exec.exit.is_none()).count() as u64;
        }
        assert_eq!(lab.usage("red").await.running_execs, there, "seed {seed}");
        let findings = lab.domain().fsck().await.findings;
        assert!(findings.iter().all(|f| f.invariant() != Invariant::I12), "{findings:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn dead_node_does_not_block_the_commands_of_its_teams_for_ever() {
    let lab = Lab::limited("running_execs=1").await;
    let id = lab.create("r1").await.expect("made").id;
    drop(lab.run(named(&id, "long", &["sleep"])).await.expect("runs"));
    lab.until_running(1).await;
    let holder = lab.holder(&id).clone();
    holder.down();
    lab.until(&id, Phase::Unreachable).await;
    let other = lab.create("r2").await.expect("made on another node").id;
    let start = || named(&other, "more", &["x", "0"]);
    tokio::time::sleep(Duration::from_mins(5)).await;
    let refused = command(&lab, start(), Bytes::new()).await;
    assert_eq!(reason(refused), Reason::QuotaExceeded, "it may be a reboot");
    tokio::time::sleep(Duration::from_mins(6)).await;
    assert_eq!(lab.usage("red").await.running_execs, 0);
    command(&lab, start(), Bytes::new()).await.expect("room again");
    lab.recounted();
    // It still runs.
    holder.up();
    lab.until(&id, Phase::Running).await;
    lab.until_running(1).await;
    lab.recounted();
}
