//! Calls about the audit log: converts the request, calls `audit`, converts the answer.

use daemon::{
    audit::{Head, Kind, Line, Report, code_number},
    status::Refusal,
};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use proto::{Reason, id::Invalid, sandbox::v1::*, time::timestamp};
use tonic::Status;

use super::sandbox::Messages;
use crate::{
    audit::{Audit, AuditError, AuditFilter, AuditQuery},
    sandbox::{Error, Sandboxes},
};

/// Entries in one message.
const PAGE: usize = 256;
/// Largest `last` of a request.
const LAST_MAX: u32 = 10_000;

impl From<AuditError> for Status {
    fn from(error: AuditError) -> Self {
        let reason = match &error {
            AuditError::Off | AuditError::Io(_) => Reason::StoreFailed,
            AuditError::Gone => Reason::EventsGone,
            AuditError::Busy | AuditError::Short(_) => Reason::TooManyCalls,
            AuditError::Stopping => Reason::ShuttingDown,
        };
        if let AuditError::Io(error) | AuditError::Short(error) = &error {
            tracing::error!(%error, "audit log cannot be read");
        }
        Refusal::new(reason, error.to_string()).into()
    }
}

/// Time of a request, milliseconds since 1970.
fn millis(
    name: &'static str,
    time: Option<prost_types::Timestamp>,
) -> Result<Option<u64>, Invalid> {
    let Some(time) = time else { return Ok(None) };
    let wrong = || Invalid::new(name, "must be a time after 1970");
    let seconds = u64::try_from(time.seconds).map_err(|_| wrong())?;
    let nanos = u64::try_from(time.nanos).map_err(|_| wrong())?;
    let ms = seconds.checked_mul(1000).and_then(|ms| ms.checked_add(nanos / 1_000_000));
    ms.map(Some).ok_or_else(wrong)
}

/// Streams entries.
pub(super) async fn list(
    audit: &Audit,
    sandboxes: &Sandboxes,
    request: ListAuditRequest,
) -> Result<Messages<ListAuditResponse>, Status> {
    let ListAuditRequest { team, sandbox, since, until, last } = request;
    if last > LAST_MAX {
        return Err(Error::from(Invalid::new("last", "must be 10000 at most")).into());
    }
    let sandbox = (!sandbox.is_empty()).then(|| {
        let found = sandboxes.identify(None, &sandbox).map(|(id, _)| id.to_string());
        // One that is long gone is named by its whole id.
        found.unwrap_or(sandbox)
    });
    let filter = AuditFilter {
        team: (!team.is_empty()).then_some(team),
        sandbox,
        since_ms: millis("since", since).map_err(Error::from)?.unwrap_or(0),
        until_ms: millis("until", until).map_err(Error::from)?,
    };
    let last = (last > 0).then_some(last as usize);
    let pages = audit.list(AuditQuery { filter, last }).await?;
    let messages = pages.map_err(Status::from).map_ok(|lines| {
        let mut lines = lines.into_iter().map(entry).peekable();
        let mut messages = Vec::new();
        while lines.peek().is_some() {
            let entries = lines.by_ref().take(PAGE).collect();
            messages.push(Ok::<_, Status>(ListAuditResponse { entries }));
        }
        stream::iter(messages)
    });
    Ok(messages.try_flatten().boxed())
}

/// Streams stored lines.
pub(super) async fn export(
    audit: &Audit,
    request: ExportAuditRequest,
) -> Result<Messages<ExportAuditResponse>, Status> {
    let since_ms = millis("since", request.since).map_err(Error::from)?.unwrap_or(0);
    let until_ms = millis("until", request.until).map_err(Error::from)?;
    let pages = audit.export(since_ms, until_ms).await?;
    let pages = pages.map_err(Status::from);
    Ok(pages.map_ok(|lines| ExportAuditResponse { lines: lines.into() }).boxed())
}

/// Verifies the log.
pub(super) async fn verify(
    audit: &Audit,
    request: VerifyAuditRequest,
) -> Result<VerifyAuditResponse, Status> {
    let wanted = request.expected.map(|head| {
        let hash = head.sha256.parse::<daemon::audit::Hash>();
        hash.map(|hash| Head { seq: head.seq, hash })
    });
    let wanted = wanted.transpose().map_err(|wrong| Error::from(wrong.named("expected.sha256")))?;
    let (report, file) = audit.verify_files(wanted).await?;
    let Report { entries, first, head, gaps, lost, broken } = report;
    Ok(VerifyAuditResponse {
        entries,
        first_seq: first,
        head: Some(AuditHead { seq: head.seq, sha256: head.hash.to_string() }),
        gaps,
        lost,
        broken: broken.map(|broken| AuditFault {
            seq: broken.seq,
            detail: broken.fault.to_string(),
            file: file.unwrap_or_default(),
        }),
    })
}

/// Adds a finding about the log itself.
pub(super) fn finding(audit: &Audit) -> Option<Finding> {
    let detail = audit.trouble()?;
    Some(Finding {
        invariant: proto::Invariant::Audit.into(),
        node: String::new(),
        subject: "audit log".into(),
        detail,
    })
}

fn entry(line: Line) -> AuditEntry {
    let Line { seq, record, .. } = line;
    let kind = match record.kind {
        Kind::Call => AuditKind::Call,
        Kind::Begun => AuditKind::Begun,
        Kind::Gap => AuditKind::Gap,
        Kind::Opened => AuditKind::Opened,
        Kind::Closed => AuditKind::Closed,
        Kind::Refused => AuditKind::Refused,
        Kind::Part => AuditKind::Part,
        Kind::Counted => AuditKind::Counted,
        Kind::Later => AuditKind::Unspecified,
    };
    let gap = AuditGap::from_str_name(&format!("AUDIT_GAP_{}", record.reason));
    let gap = gap.filter(|_| kind == AuditKind::Gap).unwrap_or_default();
    let is_call =
        matches!(kind, AuditKind::Call | AuditKind::Part | AuditKind::Refused | AuditKind::Counted);
    let reason = Reason::named(&record.reason).filter(|_| is_call);
    let duration = record.duration_ms.map(std::time::Duration::from_millis);
    AuditEntry {
        seq,
        at: Some(timestamp(record.at_ms)),
        kind: kind.into(),
        call: record.call,
        method: record.method,
        team: record.team,
        token: record.token,
        user: record.user,
        peer: record.peer,
        sandbox_id: record.sandbox,
        object: record.object,
        owner: record.owner,
        request_id: record.request_id,
        code: if is_call && !record.code.is_empty() { code_number(&record.code) } else { 0 },
        reason: reason.unwrap_or_default().into(),
        duration: duration.and_then(|time| prost_types::Duration::try_from(time).ok()),
        gap: gap.into(),
        count: record.count,
    }
}

#[cfg(test)]
mod tests {
    use daemon::status::reason;
    use tonic::Code;

    use super::*;

    #[test]
    fn caller_is_told_whether_to_ask_again() {
        let of = |code: i32| AuditError::from(std::io::Error::from_raw_os_error(code));
        let (denied, too_many_files) = (of(13), of(24));
        for (error, wanted, code) in [
            (too_many_files, Reason::TooManyCalls, Code::ResourceExhausted),
            (denied, Reason::StoreFailed, Code::Internal),
            (AuditError::Off, Reason::StoreFailed, Code::Internal),
            (AuditError::Gone, Reason::EventsGone, Code::OutOfRange),
            (AuditError::Busy, Reason::TooManyCalls, Code::ResourceExhausted),
            (AuditError::Stopping, Reason::ShuttingDown, Code::Unavailable),
        ] {
            let told = Status::from(error);
            assert_eq!((reason(&told), told.code()), (Some(wanted), code), "{told:?}");
            assert!(!told.message().contains("os error"), "{told:?}");
        }
    }
}
