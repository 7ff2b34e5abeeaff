//! Audit log: each call has its entry, under the right caller and with its outcome.

use std::collections::BTreeMap;

use daemon::audit::{Head, Kind, Line, Record};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use proto::{Reason, sandbox::v1::*};
use tokio::task::JoinSet;

use super::{
    exec::{argv, message},
    *,
};
use crate::audit::{AuditQuery, Options};

/// Entries of a log.
pub(super) async fn entries(audit: &Audit, query: AuditQuery) -> Vec<Line> {
    let pages = audit.list(query).await.expect("readable");
    pages.try_collect::<Vec<_>>().await.expect("read").concat()
}

impl Lab {
    /// Restarts the controller with an audit log.
    async fn audited(&mut self, dir: &std::path::Path, options: Options) {
        let clock = Arc::new(PausedClock(self.born));
        self.audit = Audit::open(dir, clock, options).await.expect("opened");
        self.start().await;
    }

    pub(super) async fn calls(&self) -> Vec<Line> {
        let mut lines = entries(&self.audit, AuditQuery::default()).await;
        lines.retain(|line| matches!(line.record.kind, Kind::Call | Kind::Begun));
        lines
    }

    async fn listed(&self, request: ListAuditRequest) -> Vec<AuditEntry> {
        let pages = self.operator().list_audit(request).await.expect("listed").into_inner();
        let pages: Vec<_> = pages.try_collect().await.expect("pages");
        pages.into_iter().flat_map(|page| page.entries).collect()
    }

    async fn verified(&self, expected: Option<AuditHead>) -> VerifyAuditResponse {
        let answer = self.operator().verify_audit(VerifyAuditRequest { expected }).await;
        answer.expect("verified").into_inner()
    }
}

pub(super) async fn lab() -> (Lab, tempfile::TempDir) {
    let mut lab = Lab::new().await;
    let dir = tempfile::tempdir().expect("a directory");
    lab.audited(&dir.path().join("audit"), Options::default()).await;
    (lab, dir)
}

fn stat(id: &str) -> StatFileRequest {
    StatFileRequest { id: id.into(), path: "/secret".into(), user: String::new() }
}

#[tokio::test(start_paused = true)]
async fn parallel_calls_have_one_entry_each_under_the_right_token() {
    let (lab, _dir) = lab().await;
    let (mut calls, mut expected) = (JoinSet::new(), BTreeMap::new());
    for team in 0..10 {
        let team = format!("team-{team}");
        let maker = token(&lab.store, &team, "sandbox").await;
        let sandbox = create(&mut lab.api_as(&maker), request("r1")).await.expect("made").id;
        for _ in 0..2 {
            let text = token(&lab.store, &team, "exec").await;
            let (id, _) = proto::token::split(&text).expect("a token");
            let channel = lab.channel();
            assert_eq!(expected.insert((team.clone(), id.to_owned(), sandbox.clone()), 50), None);
            for _ in 0..50 {
                let mut api: Api =
                    SandboxServiceClient::with_interceptor(channel.clone(), bearer(&text));
                let stat = stat(&sandbox);
                calls.spawn(async move { reason(api.stat_file(stat).await) });
            }
        }
    }
    let answers = calls.join_all().await;
    assert!(answers.iter().all(|reason| *reason == Reason::FileNotFound));
    let (mut found, mut numbers) = (BTreeMap::new(), std::collections::BTreeSet::new());
    for Line { record, .. } in lab.calls().await {
        if record.method == "CreateSandbox" {
            continue;
        }
        assert_eq!((record.method.as_str(), record.code.as_str()), ("StatFile", "NOT_FOUND"));
        assert!(numbers.insert(record.call), "one entry each");
        *found.entry((record.team, record.token, record.sandbox)).or_default() += 1;
    }
    assert_eq!(numbers.len(), 1000);
    assert_eq!(found, expected);
    let report = lab.audit.verify(None).await.expect("read");
    assert_eq!((report.broken, report.gaps), (None, 0));
}

#[tokio::test(start_paused = true)]
async fn entry_has_caller_object_and_outcome_and_no_contents() {
    let (lab, dir) = lab().await;
    let sandbox = lab.create("request-1").await.expect("made");
    let again = lab.create("request-1").await.expect("the same");
    assert_eq!(again.id, sandbox.id);
    lab.get(&sandbox.id).await.expect("a call that only looks");
    let mut api = lab.api();
    api.stat_file(stat(&format!("cmux-{}", sandbox.vmid))).await.expect_err("no such file");
    api.delete_sandbox(DeleteSandboxRequest { id: sandbox.id.clone() }).await.expect("deleted");
    let calls = lab.calls().await;
    let told: Vec<_> =
        calls.iter().map(|line| (line.record.method.as_str(), line.record.code.as_str())).collect();
    let stat = ("StatFile", "NOT_FOUND");
    let create = ("CreateSandbox", "OK");
    assert_eq!(told, [create, create, stat, ("DeleteSandbox", "OK")]);
    for Line { record, .. } in &calls {
        assert_eq!(record.sandbox, sandbox.id, "by any name, and what was made");
        assert_eq!((record.team.as_str(), record.owner.as_str()), ("red", ""));
        assert!(record.token.len() == 12 && record.duration_ms.is_some(), "{record:?}");
    }
    assert_eq!(calls[0].record.request_id, "request-1");
    assert_eq!(calls[2].record.reason, "FILE_NOT_FOUND");
    for file in std::fs::read_dir(dir.path().join("audit")).expect("listed") {
        let text = std::fs::read_to_string(file.expect("an entry").path()).expect("read");
        assert!(!text.contains("secret"), "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn refused_scope_has_an_entry_and_unknown_callers_are_counted() {
    let (lab, _dir) = lab().await;
    let text = token(&lab.store, "blue", "read").await;
    let answer = lab.api_as(&text).stat_file(stat("x")).await;
    assert_eq!(reason(answer), Reason::ScopeMissing);
    let unknown = issued("red", "sandbox").text(Format::Plain);
    for _ in 0..25 {
        assert_eq!(reason(lab.api_as(&unknown).stat_file(stat("x")).await), Reason::TokenInvalid);
    }
    let calls = lab.calls().await;
    let [Line { record, .. }] = calls.as_slice() else { panic!("{calls:?}") };
    assert_eq!((record.team.as_str(), record.code.as_str()), ("blue", "PERMISSION_DENIED"));
    assert_eq!(record.reason, "SCOPE_MISSING");
    tokio::time::sleep(Duration::from_secs(61)).await;
    let all = entries(&lab.audit, AuditQuery::default()).await;
    let counted = all.iter().filter(|line| line.record.kind == Kind::Refused);
    assert_eq!(counted.map(|line| line.record.count).collect::<Vec<_>>(), [25]);
}

#[tokio::test(start_paused = true)]
async fn stream_has_an_entry_at_its_begin_and_at_its_end() {
    let (lab, _dir) = lab().await;
    let sandbox = lab.create("r1").await.expect("made");
    let start = message(exec_request::Message::Start(argv(&sandbox.id, &["sleep"])));
    let (typed, input) = mpsc::channel(1);
    typed.send(start).await.expect("room");
    let input = ReceiverStream::new(input);
    let mut output = lab.api().exec(input).await.expect("started").into_inner();
    output.next().await.expect("a message").expect("no error");
    let begun = lab.calls().await.pop().expect("an entry").record;
    assert_eq!((begun.kind, begun.method.as_str()), (Kind::Begun, "Exec"));
    assert_eq!(begun.sandbox, sandbox.id);
    // The caller hangs up.
    drop((output, typed));
    let mut ended = begun.clone();
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        ended = lab.calls().await.pop().expect("an entry").record;
        if ended.kind == Kind::Call {
            break;
        }
    }
    assert_eq!((ended.kind, ended.code.as_str()), (Kind::Call, "CANCELLED"));
    assert_eq!((ended.call, &ended.sandbox), (begun.call, &sandbox.id));

    let start = message(exec_request::Message::Start(argv(&sandbox.id, &["x", "0"])));
    let output = lab.api().exec(stream::iter([start])).await.expect("started").into_inner();
    output.try_collect::<Vec<_>>().await.expect("it ends");
    let ended = lab.calls().await.pop().expect("an entry").record;
    assert_eq!((ended.kind, ended.code.as_str()), (Kind::Call, "OK"));
}

#[tokio::test(start_paused = true)]
async fn team_is_told_of_its_calls_and_of_what_operators_did_to_it() {
    let (lab, _dir) = lab().await;
    let blue = token(&lab.store, "blue", "sandbox").await;
    let theirs = create(&mut lab.api_as(&blue), request("r1")).await.expect("made");
    let team = Some(Team { name: "blue".into(), ..Team::default() });
    let change = UpdateTeamRequest { team, update_mask: None };
    lab.operator().update_team(change).await.expect_err("no mask");
    let release = ReleaseSandboxRequest { id: theirs.id.clone() };
    lab.operator().release_sandbox(release).await.expect_err("it is not adopted");
    lab.create("r1").await.expect("of another team");
    let request = ListAuditRequest { team: "blue".into(), ..ListAuditRequest::default() };
    let told: Vec<_> = lab.listed(request).await;
    let told: Vec<_> =
        told.iter().map(|e| (e.method.as_str(), e.team.as_str(), e.owner.as_str())).collect();
    let expected = [
        ("CreateSandbox", "blue", ""),
        ("UpdateTeam", "red", "blue"),
        ("ReleaseSandbox", "red", "blue"),
        ("ListAudit", "red", "blue"),
    ];
    assert_eq!(told, expected);
    let request = ListAuditRequest { sandbox: theirs.id, last: 1, ..ListAuditRequest::default() };
    let told = lab.listed(request).await;
    assert_eq!(told.iter().map(|e| e.method.as_str()).collect::<Vec<_>>(), ["ListAudit"]);
    assert!(told[0].seq > 1 && told[0].at.is_some() && told[0].kind() == AuditKind::Begun);
    let mut api = OperatorServiceClient::with_interceptor(lab.channel(), bearer(&blue));
    let answer = api.list_audit(ListAuditRequest::default()).await;
    assert_eq!(reason(answer), Reason::ScopeMissing);
}

#[tokio::test(start_paused = true)]
async fn export_is_what_is_stored_and_verification_finds_a_change() {
    let (lab, dir) = lab().await;
    for number in 0..20 {
        let cordon = CordonNodeRequest { node: format!("web-{number}"), why: String::new() };
        lab.operator().cordon_node(cordon).await.expect_err("there is none");
    }
    let first = lab.verified(None).await;
    assert_eq!((first.broken, first.first_seq, first.gaps), (None, 1, 0));
    let head = first.head.expect("a head");

    let pages = lab.operator().export_audit(ExportAuditRequest::default()).await;
    let pages: Vec<_> = pages.expect("exported").into_inner().try_collect().await.expect("pages");
    let exported: Vec<u8> = pages.iter().flat_map(|page| page.lines.to_vec()).collect();
    let noted = Head { seq: head.seq, hash: head.sha256.parse().expect("a hash") };
    let report = daemon::audit::verify(&mut exported.as_slice(), Some(noted)).expect("read");
    assert_eq!(report.broken, None);
    let path = dir.path().join(format!("audit/audit-{:020}.jsonl", 1));
    let stored = std::fs::read(&path).expect("read");
    assert!(stored.starts_with(&exported) && exported.len() > 2000);
    let from = lab.now_ms() + 60_000;
    let since = Some(prost_types::Timestamp { seconds: (from / 1000) as i64, nanos: 0 });
    let none = lab.operator().export_audit(ExportAuditRequest { since, until: None }).await;
    let none: Vec<_> = none.expect("exported").into_inner().try_collect().await.expect("pages");
    assert!(none.is_empty(), "{none:?}");

    let later = lab.verified(Some(head.clone())).await;
    assert_eq!(later.broken, None);
    let changed = String::from_utf8(stored).expect("text").replace("web-7", "web-8");
    std::fs::write(&path, changed).expect("written");
    let broken = lab.verified(Some(head)).await.broken.expect("it is found");
    assert_eq!(broken.seq, 10, "the line after the eighth call: {broken:?}");
}

#[tokio::test(start_paused = true)]
async fn log_that_cannot_be_written_is_a_finding_and_calls_go_on() {
    let mut lab = Lab::new().await;
    let dir = tempfile::tempdir().expect("a directory");
    let (log, away) = (dir.path().join("audit"), dir.path().join("away"));
    // Each sync ends a segment, so that the next write needs the directory.
    let options = Options { segment_bytes: 1, queue: 16, ..Options::default() };
    lab.audited(&log, options).await;
    std::fs::rename(&log, &away).expect("moved");
    lab.api().stat_file(stat("web")).await.expect_err("there is none");
    lab.audit.flush().await;
    let findings = lab.operator().fsck(FsckRequest {}).await.expect("checked").into_inner();
    let found = findings.findings.iter().find(|found| found.invariant() == Invariant::Audit);
    assert!(found.is_some_and(|found| found.detail.contains("nothing can be written")));
    std::fs::rename(&away, &log).expect("back");
    tokio::time::sleep(Duration::from_secs(5)).await;
    lab.audit.flush().await;
    let methods: Vec<_> = lab.calls().await.into_iter().map(|line| line.record.method).collect();
    assert_eq!(methods, ["StatFile", "Fsck"], "nothing is lost");
    let findings = lab.operator().fsck(FsckRequest {}).await.expect("checked").into_inner();
    assert!(findings.findings.iter().all(|found| found.invariant() != Invariant::Audit));
}

#[tokio::test(start_paused = true)]
async fn token_that_may_only_read_cannot_fill_the_log() {
    let (lab, _dir) = lab().await;
    let reader = token(&lab.store, "blue", "read").await;
    let mut api = lab.api_as(&reader);
    for _ in 0..500 {
        assert_eq!(reason(api.stat_file(stat("x")).await), Reason::ScopeMissing);
    }
    let delete = DeleteSandboxRequest { id: "x".into() };
    assert_eq!(reason(api.delete_sandbox(delete).await), Reason::ScopeMissing);
    lab.create("r1").await.expect("made");
    let calls = lab.calls().await;
    let told: Vec<_> =
        calls.iter().map(|line| (line.record.method.as_str(), line.record.code.as_str())).collect();
    let refused = |method| (method, "PERMISSION_DENIED");
    let expected = [refused("StatFile"), refused("DeleteSandbox"), ("CreateSandbox", "OK")];
    assert_eq!(told, expected, "one of each kind, and all that was allowed");
    tokio::time::sleep(Duration::from_secs(61)).await;
    let request = ListAuditRequest { team: "blue".into(), ..ListAuditRequest::default() };
    let listed = lab.listed(request).await;
    let counted: Vec<_> =
        listed.iter().filter(|entry| entry.kind() == AuditKind::Refused).collect();
    let [counted] = counted.as_slice() else { panic!("{counted:?}") };
    assert_eq!((counted.count, counted.method.as_str()), (499, "StatFile"));
    assert_eq!((counted.reason(), counted.code), (Reason::ScopeMissing, 7));
    assert_eq!((counted.team.as_str(), counted.peer.as_str()), ("blue", ""));
}

#[tokio::test(start_paused = true)]
async fn calls_about_no_sandbox_cannot_fill_the_log() {
    let (lab, _dir) = lab().await;
    let text = token(&lab.store, "blue", "exec").await;
    let mut api = lab.api_as(&text);
    let odd = "\u{1}".repeat(128);
    let read = || ReadFileRequest { id: "none".into(), path: "/x".into(), ..Default::default() };
    for _ in 0..100 {
        assert_eq!(reason(api.stat_file(stat(&odd)).await), Reason::FieldInvalid);
        assert_eq!(reason(api.stat_file(stat("none")).await), Reason::SandboxNotFound);
        assert_eq!(reason(api.read_file(read()).await), Reason::SandboxNotFound);
    }
    let calls = lab.calls().await;
    let told: Vec<_> = calls
        .iter()
        .map(|Line { record, .. }| {
            let Record { kind, method, reason, object, .. } = record;
            (*kind, method.as_str(), reason.as_str(), object.as_str())
        })
        .collect();
    let shown = format!("sandbox:{}", "?".repeat(128));
    let expected = [
        (Kind::Call, "StatFile", "FIELD_INVALID", shown.as_str()),
        (Kind::Call, "StatFile", "SANDBOX_NOT_FOUND", "sandbox:none"),
        (Kind::Call, "ReadFile", "SANDBOX_NOT_FOUND", "sandbox:none"),
    ];
    assert_eq!(told, expected, "the first of each kind, and no begin of a stream into nothing");
    tokio::time::sleep(Duration::from_secs(61)).await;
    let all = entries(&lab.audit, AuditQuery::default()).await;
    let counted = all.iter().filter(|line| line.record.kind == Kind::Refused);
    assert_eq!(counted.map(|line| line.record.count).collect::<Vec<_>>(), [99; 3]);
    let report = lab.audit.verify(None).await.expect("read");
    assert_eq!((report.broken, report.gaps), (None, 0));
}

#[tokio::test(start_paused = true)]
async fn every_sandbox_of_a_prune_has_its_entry() {
    let (lab, _dir) = lab().await;
    let mut ids = Vec::new();
    for number in 0..3 {
        let sandbox = lab.create(&format!("r{number}")).await.expect("made");
        let holder = lab.holder(&sandbox.id).clone();
        let mut stopped =
            holder.living().into_iter().find(|known| known.id == sandbox.id).expect("there");
        stopped.set_phase(Phase::Stopped);
        stopped.since = Some(prost_types::Timestamp { seconds: 1_600_000_000, nanos: 0 });
        holder.put(stopped);
        lab.until(&sandbox.id, Phase::Stopped).await;
        ids.push(sandbox.id);
    }
    let prune = |dry_run| PruneSandboxesRequest {
        older_than: Some(prost_types::Duration { seconds: 3600, nanos: 0 }),
        paused: false,
        dry_run,
    };
    lab.api().prune_sandboxes(prune(true)).await.expect("looked");
    let pruned = lab.api().prune_sandboxes(prune(false)).await.expect("pruned").into_inner();
    assert_eq!(pruned.sandboxes.len(), 3);
    let all = entries(&lab.audit, AuditQuery::default()).await;
    let of_kind = |kind| all.iter().map(|line| &line.record).filter(move |r| r.kind == kind);
    let call = of_kind(Kind::Call).next_back().expect("an entry").clone();
    assert_eq!((call.method.as_str(), call.sandbox.as_str()), ("PruneSandboxes", ""));
    let mut told = Vec::new();
    for part in of_kind(Kind::Part) {
        assert_eq!((part.call, &part.token, &part.method), (call.call, &call.token, &call.method));
        assert_eq!((part.code.as_str(), part.owner.as_str()), ("OK", ""));
        told.push(part.sandbox.clone());
    }
    told.sort_unstable();
    ids.sort_unstable();
    assert_eq!(told, ids, "a dry run has none");
    let request = ListAuditRequest { sandbox: ids[0].clone(), ..ListAuditRequest::default() };
    let listed = lab.listed(request).await;
    assert!(listed.iter().any(|entry| entry.kind() == AuditKind::Part), "{listed:?}");
}

#[tokio::test(start_paused = true)]
async fn every_sandbox_of_a_lost_node_has_its_entry_with_its_owner() {
    let (mut lab, _dir) = lab().await;
    // One that is configured cannot be forgotten.
    lab.agents[0].add_member("n1", "10.0.0.1");
    lab.agents[0].add_member("n2", "10.0.0.2");
    lab.discover = true;
    lab.start().await;
    lab.controller.as_ref().expect("a controller").settled(Duration::from_secs(5)).await;
    let blue = token(&lab.store, "blue", "sandbox").await;
    let mut api = lab.api_as(&blue);
    let mut on_n2 = Vec::new();
    for number in 0..6 {
        let made = create(&mut api, request(&format!("r{number}"))).await.expect("made");
        if made.node == "n2" {
            on_n2.push(made.id);
        }
    }
    assert!(!on_n2.is_empty(), "some are on each node");
    lab.agents[1].down();
    for id in &on_n2 {
        lab.until(id, Phase::Unreachable).await;
    }
    let forget = |dry_run| ForgetNodeRequest { node: "n2".into(), lost: true, dry_run };
    lab.operator().forget_node(forget(true)).await.expect("looked");
    let looked = entries(&lab.audit, AuditQuery::default()).await;
    assert!(looked.iter().all(|line| line.record.kind != Kind::Part), "a dry run has none");
    let forget = forget(false);
    lab.operator().forget_node(forget).await.expect("forgotten");
    let all = entries(&lab.audit, AuditQuery::default()).await;
    let parts = all.iter().map(|line| &line.record).filter(|record| record.kind == Kind::Part);
    let mut told: Vec<_> = parts
        .inspect(|part| assert_eq!((part.team.as_str(), part.owner.as_str()), ("red", "blue")))
        .map(|part| part.sandbox.clone())
        .collect();
    told.sort_unstable();
    on_n2.sort_unstable();
    assert_eq!(told, on_n2);
}

#[tokio::test(start_paused = true)]
async fn call_that_ends_with_its_token_is_cut_and_not_refused_and_keeps_its_parts() {
    let (lab, _dir) = lab().await;
    let sandbox = lab.create("r1").await.expect("made");
    for agent in &lab.agents {
        let mut item = GarbageItem { node: agent.name().to_string(), ..GarbageItem::default() };
        item.subject.clone_from(&sandbox.id);
        item.set_action(GarbageAction::Undo);
        agent.faults(|faults| faults.garbage = Some((Duration::from_secs(5), vec![item])));
    }
    let second = issued("red", "sandbox operator");
    lab.store.add_token(second.token.clone()).await.expect("stored");
    let text = second.text(Format::Plain);
    let collect = |dry_run| {
        let channel = lab.channel();
        let mut operator = OperatorServiceClient::with_interceptor(channel, bearer(&text));
        let request = CollectGarbageRequest { dry_run, node: String::new() };
        tokio::spawn(async move { operator.collect_garbage(request).await })
    };
    let items = collect(true).await.expect("no panic").expect("looked").into_inner().items;
    assert_eq!(items.len(), 3);
    let (gc, watch) = (collect(false), WatchSandboxRequest { id: sandbox.id.clone() });
    let watch = lab.api_as(&text).watch_sandbox(watch).await.expect("watches");
    tokio::time::sleep(Duration::from_secs(1)).await;
    lab.store.revoke_token(&second.token.id, 5).await.expect("revoked");
    assert_eq!(reason(gc.await.expect("no panic")), Reason::TokenInvalid);
    drop(watch);
    // The nodes finish what they were asked for.
    tokio::time::sleep(Duration::from_secs(10)).await;
    let mut all = entries(&lab.audit, AuditQuery::default()).await;
    all.retain(|line| line.record.method == "CollectGarbage");
    let told = |kind| {
        let of_kind = all.iter().filter(move |line| line.record.kind == kind);
        of_kind.map(|line| &line.record).collect::<Vec<_>>()
    };
    let calls: Vec<_> = told(Kind::Call)
        .into_iter()
        .map(|record| (record.code.as_str(), record.reason.as_str()))
        .collect();
    assert_eq!(calls, [("OK", ""), ("CANCELLED", "TOKEN_INVALID")]);
    // One of each node, and none of the dry run.
    let parts = told(Kind::Part);
    assert_eq!(parts.len(), 3, "{parts:?}");
    for part in parts {
        assert_eq!((part.code.as_str(), &part.sandbox), ("OK", &sandbox.id));
        assert_eq!(part.token, second.token.id);
    }
}
