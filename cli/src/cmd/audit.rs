//! `audit`: lists, exports and verifies the audit log. An export is verified without a controller.

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Subcommand};
use daemon::audit::{Head, code_name};
use prost_types::Timestamp;
use proto::{
    Reason,
    sandbox::v1::{
        AuditEntry, AuditFault, AuditGap, AuditHead, AuditKind, ExportAuditRequest,
        ListAuditRequest, VerifyAuditRequest,
    },
};
use serde_json::{Value, json};
use tokio::time::timeout;
use tonic::{Code, Streaming};

use crate::{
    client::{Controller, answer, promised},
    exit,
    failure::Failure,
    listing::Listing,
    output::{
        Output,
        layout::{Column, Fit},
        table::{self, Colour, Table},
        time,
    },
    values,
};

/// Silence after which a stream counts as broken.
const SILENCE: Duration = Duration::from_secs(60);
/// Deadline of a verification, which reads the whole log.
const VERIFY: Duration = Duration::from_secs(120);

/// Digits of an id that are shown on a terminal.
const ID_DIGITS: usize = 8;

/// Verbs of `audit`.
#[derive(Debug, Subcommand)]
pub(crate) enum AuditVerb {
    /// List entries: who called what, when, from where, and how it ended
    #[command(visible_alias = "list")]
    Ls(Ls),
    /// Print the stored lines, to keep and to verify them elsewhere
    Export(Export),
    /// Check that no entry was changed, removed or added; exit 1 if one was
    Verify(Verify),
}

/// Arguments of `audit ls`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl audit ls                         the last 50 entries
  sandboxctl audit ls --team acme --since 1d  calls of the team, and those of
                                              operators on what it owns
  sandboxctl audit ls --sandbox ID -n 1000 --json

A call has an entry when it ends; a stream, such as a command's, has one more
(`begun`) when it begins. A call that changes many sandboxes, such as `prune`,
has one more (`part`) for each.")]
pub(crate) struct Ls {
    /// Entries of this team, and of others on what it owns
    #[arg(long)]
    team: Option<String>,
    /// Entries of this sandbox; one that is long gone by its whole id
    #[arg(long, value_name = "ID")]
    pub(super) sandbox: Option<String>,
    /// Span of time.
    #[command(flatten)]
    span: Span,
    /// At most so many, the newest
    #[arg(short = 'n', long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    last: u32,
    /// Flags of the list.
    #[command(flatten)]
    listing: Listing,
}

/// Arguments of `audit export`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl audit export > audit.jsonl         all that is kept
  sandboxctl audit export --since 1d > day.jsonl
  sandboxctl audit verify audit.jsonl

The lines have no holes, so that they can be verified: there is no other filter
than the time.")]
pub(crate) struct Export {
    /// Span of time.
    #[command(flatten)]
    span: Span,
}

/// Arguments of `audit verify`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl audit verify                       the log of the controller
  sandboxctl audit verify audit.jsonl           an export, without a controller
  sandboxctl audit verify --head 4711:9f86d0...a08

The last line of the output is the head: the number and the hash of the last
entry. Keep it elsewhere. With --head, a later check finds any change of what
was there then, also where everything after it was made anew.")]
pub(crate) struct Verify {
    /// Export to check [default: the log of the controller]
    #[arg(value_name = "FILE")]
    pub(super) file: Option<PathBuf>,
    /// Head of an earlier check, which must still be there
    #[arg(long, value_name = "NUMBER:HASH")]
    pub(super) head: Option<Head>,
}

/// Span of time.
#[derive(Debug, Args)]
struct Span {
    /// Not before this time: an age such as 12h or 30d, or a time such as 2026-03-01T08:00:00Z
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Timestamp>,
    /// Not after this time
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<Timestamp>,
}

/// Parses an age or a time.
fn moment(text: &str) -> Result<Timestamp, String> {
    if let Some(time) = time::parsed(text) {
        return Ok(time);
    }
    let wrong = |_| "must be an age such as 12h or 30d, or a time such as 2026-03-01T08:00:00Z";
    let age = values::age(text).map_err(wrong)?;
    let age = i64::try_from(age.as_secs()).unwrap_or(i64::MAX);
    Ok(Timestamp { seconds: time::now_seconds().saturating_sub(age).max(0), nanos: 0 })
}

const COLUMNS: &[Column] = &[
    Column::new("SEQ").rank(6).right(),
    Column::new("AT"),
    Column::new("TEAM").rank(3).fit(Fit::Cut(8)),
    Column::new("WHO").rank(2).fit(Fit::Cut(12)),
    Column::new("CALL").fit(Fit::Cut(14)),
    Column::new("OBJECT").rank(1).fit(Fit::Cut(12)),
    Column::new("OUTCOME").fit(Fit::Cut(12)),
    Column::new("FROM").extra(),
    Column::new("TOOK").extra().right(),
];

pub(super) async fn run(
    controller: Controller,
    verb: AuditVerb,
    output: Output,
) -> Result<u8, Failure> {
    match verb {
        AuditVerb::Ls(args) => ls(controller, args, output).await,
        AuditVerb::Export(args) => export(controller, args, output).await,
        AuditVerb::Verify(args) => verify(controller, args, output).await,
    }
}

async fn next<T>(stream: &mut Streaming<T>) -> Result<Option<T>, Failure> {
    match timeout(SILENCE, stream.message()).await {
        Ok(message) => Ok(message?),
        Err(_) => Err(Failure::deadline("the controller sent nothing", SILENCE)),
    }
}

async fn ls(controller: Controller, args: Ls, output: Output) -> Result<u8, Failure> {
    let request = ListAuditRequest {
        team: args.team.unwrap_or_default(),
        sandbox: args.sandbox.unwrap_or_default(),
        since: args.span.since,
        until: args.span.until,
        last: args.last,
    };
    let mut pages = answer(controller.operator.clone().list_audit(request)).await?;
    let mut entries = Vec::new();
    while let Some(page) = next(&mut pages).await? {
        entries.extend(page.entries);
    }
    let values: Vec<_> = entries.iter().map(value).collect();
    let short = output.room.is_some() && !output.wide;
    args.listing.print(output, table(&entries, short), &values, "no entries")?;
    if entries.len() == args.last as usize {
        output.note(format!("the newest {}; -n shows more", args.last));
    }
    Ok(0)
}

async fn export(controller: Controller, args: Export, output: Output) -> Result<u8, Failure> {
    let request = ExportAuditRequest { since: args.span.since, until: args.span.until };
    let mut pages = answer(controller.operator.clone().export_audit(request)).await?;
    while let Some(page) = next(&mut pages).await? {
        output.bytes(&page.lines)?;
    }
    Ok(0)
}

/// Result of a check, of a file or of the controller's log.
struct Checked {
    entries: u64,
    first: u64,
    head: Option<Head>,
    gaps: u64,
    lost: u64,
    /// First mistake: where, its number, and a sentence.
    broken: Option<(String, u64, String)>,
}

async fn verify(controller: Controller, args: Verify, output: Output) -> Result<u8, Failure> {
    let head = |head: Head| AuditHead { seq: head.seq, sha256: head.hash.to_string() };
    let request = VerifyAuditRequest { expected: args.head.map(head) };
    let mut operator = controller.operator.clone();
    let report = timeout(VERIFY, operator.verify_audit(request))
        .await
        .map_err(|_| Failure::deadline("the check did not end", VERIFY))??
        .into_inner();
    let head = promised(report.head)?;
    let hash = promised(head.sha256.parse().ok())?;
    let checked = Checked {
        entries: report.entries,
        first: report.first_seq,
        head: Some(Head { seq: head.seq, hash }),
        gaps: report.gaps,
        lost: report.lost,
        broken: report.broken.map(|broken| (place(&broken), broken.seq, broken.detail)),
    };
    show(&checked, output)
}

/// Says where a mistake in the controller's log is.
fn place(broken: &AuditFault) -> String {
    match broken.file.as_str() {
        "" => format!("entry {}", broken.seq),
        file => format!("entry {} in {file}", broken.seq),
    }
}

/// Checks an export.
///
/// # Errors
/// When the file cannot be read.
pub(super) fn verify_file(file: &Path, head: Option<Head>, output: Output) -> Result<u8, Failure> {
    let unreadable = |error| Failure::local(format!("cannot read {}: {error}", file.display()));
    let mut reader = BufReader::new(File::open(file).map_err(unreadable)?);
    let report = daemon::audit::verify(&mut reader, head).map_err(unreadable)?;
    let broken = report.broken.map(|broken| {
        let place = format!("line {} of {} (entry {})", broken.line, file.display(), broken.seq);
        (place, broken.seq, broken.fault.to_string())
    });
    let checked = Checked {
        entries: report.entries,
        first: report.first,
        head: (report.entries > 0).then_some(report.head),
        gaps: report.gaps,
        lost: report.lost,
        broken,
    };
    show(&checked, output)
}

fn show(checked: &Checked, output: Output) -> Result<u8, Failure> {
    let Checked { entries, first, head, gaps, lost, broken } = checked;
    let code = if broken.is_some() { exit::REFUSED } else { 0 };
    if output.json {
        let broken = broken
            .as_ref()
            .map(|(place, seq, detail)| json!({ "place": place, "seq": seq, "detail": detail }));
        output.value(&json!({
            "entries": entries,
            "first": first,
            "head": head.map(|head| head.to_string()),
            "gaps": gaps,
            "lost": lost,
            "broken": broken,
        }))?;
        return Ok(code);
    }
    if let Some((place, _, detail)) = broken {
        output.line(format!("{place} is wrong: {detail}"))?;
    }
    let last = head.map_or(0, |head| head.seq);
    let right = if broken.is_some() { "right beside it" } else { "right" };
    match entries {
        0 => output.line("no entries")?,
        1 => output.line(format!("1 entry is {right}: {last}"))?,
        _ => output.line(format!("{entries} entries are {right}: {first} to {last}"))?,
    }
    if *gaps > 0 {
        let known = match lost {
            0 => String::new(),
            lost => format!("; {lost} missing ones were counted"),
        };
        output.line(format!("places where entries are missing: {gaps}{known}"))?;
    }
    if let Some(head) = head {
        output.line(format!("head {head}"))?;
    }
    Ok(code)
}

/// Name of a kind.
fn kind(entry: &AuditEntry) -> String {
    if entry.kind() == AuditKind::Unspecified {
        // Kind of a later version of the controller.
        return "unknown".into();
    }
    entry.kind().as_str_name().trim_start_matches("AUDIT_KIND_").to_lowercase()
}

/// Name of the reason of an error or a gap; empty without one.
fn reason(entry: &AuditEntry) -> &'static str {
    match (entry.gap(), entry.reason()) {
        (AuditGap::Unspecified, Reason::Unspecified) => "",
        (AuditGap::Unspecified, reason) => reason.name(),
        (gap, _) => gap.as_str_name().trim_start_matches("AUDIT_GAP_"),
    }
}

fn outcome(entry: &AuditEntry) -> (String, Colour) {
    match (entry.kind(), reason(entry)) {
        (AuditKind::Call | AuditKind::Part, "") if entry.code == 0 => ("ok".into(), Colour::Green),
        (AuditKind::Call | AuditKind::Part, "") => (code_name(entry.code).into(), Colour::Red),
        // Its token ended while it was under way: it may be done.
        (AuditKind::Call, reason) if entry.code == i32::from(Code::Cancelled) => {
            (format!("cut: {reason}"), Colour::Red)
        }
        (AuditKind::Call | AuditKind::Part, reason) => (reason.into(), Colour::Red),
        (AuditKind::Gap, reason) if entry.count > 0 => {
            (format!("{reason}: {} missing", entry.count), Colour::Red)
        }
        (AuditKind::Gap, reason) => (reason.into(), Colour::Red),
        (AuditKind::Refused, "") => (format!("{} calls", entry.count), Colour::Grey),
        (AuditKind::Refused, reason) => (format!("{reason}: {} more", entry.count), Colour::Red),
        // Of more kinds than are told apart.
        (AuditKind::Counted, _) if entry.method.is_empty() => {
            (format!("{} calls", entry.count), Colour::Grey)
        }
        (AuditKind::Counted, "") => {
            (format!("{}: {} calls", code_name(entry.code), entry.count), Colour::Grey)
        }
        (AuditKind::Counted, reason) => (format!("{reason}: {} calls", entry.count), Colour::Grey),
        (AuditKind::Begun, _) => ("begun".into(), Colour::Grey),
        (AuditKind::Opened | AuditKind::Closed | AuditKind::Unspecified, _) => {
            (String::new(), Colour::Grey)
        }
    }
}

/// Table of entries; times and ids for people are short.
fn table(entries: &[AuditEntry], short: bool) -> Table {
    let mut table = Table::new(COLUMNS);
    for entry in entries {
        let at = time::rfc3339(entry.at).unwrap_or_default();
        let who = if entry.user.is_empty() { &entry.token } else { &entry.user };
        let call = if entry.method.is_empty() { kind(entry) } else { entry.method.clone() };
        let object = match entry.sandbox_id.as_str() {
            "" => entry.object.as_str(),
            id if short => end_of(id),
            id => id,
        };
        let (outcome, colour) = outcome(entry);
        let took =
            entry.duration.map(|took| took.seconds * 1000 + i64::from(took.nanos) / 1_000_000);
        table.row(vec![
            table::number(entry.seq),
            table::cell(if short { time::day_and_time(&at) } else { at }),
            table::cell(&entry.team),
            table::cell(who),
            table::cell(call),
            table::cell(object),
            table::cell(outcome).colour(colour),
            table::cell(&entry.peer),
            table::cell(took.map(|ms| format!("{ms} ms")).unwrap_or_default()),
        ]);
    }
    table
}

/// Last digits of an id, by which it can be named.
fn end_of(id: &str) -> &str {
    id.len().checked_sub(ID_DIGITS).and_then(|start| id.get(start..)).unwrap_or(id)
}

/// JSON of an entry.
fn value(entry: &AuditEntry) -> Value {
    let has_code = match entry.kind() {
        AuditKind::Call | AuditKind::Part => true,
        AuditKind::Counted => !entry.method.is_empty(),
        // Of callers that nobody knew, there is none.
        AuditKind::Refused => entry.code != 0,
        AuditKind::Unspecified
        | AuditKind::Begun
        | AuditKind::Gap
        | AuditKind::Opened
        | AuditKind::Closed => false,
    };
    json!({
        "seq": entry.seq,
        "at": time::rfc3339(entry.at),
        "kind": kind(entry),
        "call": entry.call,
        "method": entry.method,
        "team": entry.team,
        "token": entry.token,
        "user": entry.user,
        "peer": entry.peer,
        "sandbox_id": entry.sandbox_id,
        "object": entry.object,
        "owner": entry.owner,
        "request_id": entry.request_id,
        "code": if has_code { code_name(entry.code) } else { "" },
        "reason": reason(entry),
        "duration_s": entry.duration.map(|took| took.seconds as f64 + f64::from(took.nanos) / 1e9),
        "count": entry.count,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Table with long values, for the screens.
    pub(in crate::cmd) fn screen() -> Table {
        let entry = |seq, method: &str, reason: Reason| AuditEntry {
            seq,
            at: Some(Timestamp { seconds: 1_700_000_000, nanos: 0 }),
            kind: AuditKind::Call.into(),
            method: method.into(),
            team: "platform-engineering".into(),
            token: "0a1b2c3d4e5f".into(),
            user: "ada.lovelace@example.com".into(),
            sandbox_id: "pvelxc-06g1t7q8hk0fjf1k8m2v3n4p5q".into(),
            peer: "203.0.113.7:51234".into(),
            code: reason.code().into(),
            reason: reason.into(),
            ..AuditEntry::default()
        };
        let gap = AuditEntry {
            seq: 1_234_569,
            kind: AuditKind::Gap.into(),
            gap: AuditGap::QueueFull.into(),
            count: 92,
            ..AuditEntry::default()
        };
        let ok = AuditEntry { code: 0, ..entry(1_234_567, "Exec", Reason::Unspecified) };
        table(&[ok, entry(1_234_568, "GetOrCreateSandbox", Reason::QuotaExceeded), gap], true)
    }

    #[test]
    fn counted_calls_are_told_with_their_outcome() {
        let entry = |method: &str, reason: Reason| AuditEntry {
            kind: AuditKind::Counted.into(),
            method: method.into(),
            code: reason.code().into(),
            reason: reason.into(),
            count: 7,
            ..AuditEntry::default()
        };
        let missing = entry("StatFile", Reason::FileNotFound);
        let done = AuditEntry { code: 0, ..entry("StatFile", Reason::Unspecified) };
        let rest = AuditEntry { code: 0, ..entry("", Reason::Unspecified) };
        let told = |entry| outcome(entry).0;
        assert_eq!(told(&missing), "FILE_NOT_FOUND: 7 calls");
        assert_eq!((told(&done), told(&rest)), ("OK: 7 calls".into(), "7 calls".into()));
        let code = |entry| value(entry)["code"].as_str().map(str::to_owned);
        assert_eq!(code(&missing).as_deref(), Some("NOT_FOUND"));
        assert_eq!((code(&done).as_deref(), code(&rest).as_deref()), (Some("OK"), Some("")));
        assert_eq!(kind(&done), "counted");
    }

    #[test]
    fn times_are_ages_or_moments() {
        let at = |text: &str| moment(text).map(|time| time.seconds);
        assert_eq!(at("2023-11-14T22:13:20Z"), Ok(1_700_000_000));
        assert_eq!(at("2023-11-14T23:13:20+01:00"), Ok(1_700_000_000));
        let day = time::now_seconds() - at("1d").expect("an age");
        assert!((86_400..86_410).contains(&day));
        at("yesterday").expect_err("no time");
    }
}
