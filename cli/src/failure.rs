//! Errors: a sentence, the reason that programs branch on, the next step, an exit code.

use std::{error::Error, fmt, io, time::Duration};

use proto::Reason;
use serde_json::json;
use tonic::{Code, Status};

use crate::{
    exit, hint,
    printable::{self, one_line, printable},
};

/// Reason why the verb failed.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Sentence without a full stop.
    pub message: String,
    /// Name of the API's reason, if it gave one; this program may be too old to know it.
    pub reason: Option<String>,
    /// Next step for the user.
    pub hint: Option<String>,
    /// Exit code.
    pub exit: u8,
    /// Delay after which the same call may succeed.
    pub retry_after: Option<Duration>,
    /// Whether the connection or the other side failed, so that nothing was decided.
    pub transient: bool,
    /// Whether no connection was made, so that the call never arrived.
    pub unreached: bool,
    /// Whether the controller has too much to do, or is being started.
    pub overloaded: bool,
}

impl Failure {
    /// Creates a failure on this side of the wire.
    pub fn local(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            reason: None,
            hint: None,
            exit: exit::REFUSED,
            retry_after: None,
            transient: false,
            unreached: false,
            overloaded: false,
        }
    }

    /// Creates a failure of usage or configuration, with the remedy.
    pub fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), exit: exit::USAGE, ..Self::local(message) }
    }

    /// Sets the next step.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Sets another exit code.
    #[must_use]
    pub fn exit(mut self, exit: u8) -> Self {
        self.exit = exit;
        self
    }

    /// Creates a failure from that of a creation or another operation in the API.
    pub fn recorded(failure: &proto::sandbox::v1::Failure) -> Self {
        let mut message = failure.message.clone();
        if !failure.rollback.is_empty() {
            message = format!("{message}; rollback: {}", failure.rollback);
        }
        Self::local(message).with_reason(failure.reason().name())
    }

    /// Creates a failure for a wait that exceeded its limit.
    pub fn deadline(what: &str, waited: Duration) -> Self {
        let waited = match waited.subsec_millis() {
            0 => format!("{} s", waited.as_secs()),
            _ => format!("{} ms", waited.as_millis()),
        };
        Self {
            hint: Some(
                "it may still be done: look with `sandboxctl ls` or `sandboxctl get ID`".into(),
            ),
            exit: exit::NOT_NOW,
            transient: true,
            ..Self::local(format!("{what} within {waited}"))
        }
    }

    /// Creates a failure found on this side, with a reason of the API.
    pub fn of_reason(reason: Reason, message: impl Into<String>) -> Self {
        Self::local(message).with_reason(reason.name())
    }

    /// True for errors of a call while its node's agent restarts or stops.
    pub fn is_of_a_restart(&self) -> bool {
        matches!(self.known(), Some(Reason::NodeUnreachable | Reason::ShuttingDown))
    }

    /// True when the controller or a node did not keep up. The same call can be made again, if it
    /// never arrived or is not done twice.
    pub fn is_overload(&self) -> bool {
        self.overloaded || matches!(self.known(), Some(Reason::TooManyCalls | Reason::QueueFull))
    }

    /// Sets a hint for a verb that can be repeated, because the table's hint for an unknown outcome
    /// is about creations.
    #[must_use]
    pub fn repeatable(mut self) -> Self {
        if self.known() == Some(Reason::OutcomeUnknown)
            || self.reason.is_none() && self.transient && !self.unreached
        {
            let next = "it may be done by now: `sandboxctl get ID` shows it; the same command can be run again, it is not done twice";
            self.hint = Some(next.to_owned());
        }
        self
    }

    /// Reason, if this program knows it.
    pub fn known(&self) -> Option<Reason> {
        Reason::named(self.reason.as_deref()?)
    }

    fn with_reason(mut self, reason: &str) -> Self {
        if let Some(hint) = Reason::named(reason).map(hint::of) {
            self.exit = hint.exit;
            self.hint = Some(hint.next.to_owned());
        }
        self.reason = (!reason.is_empty()).then(|| reason.to_owned());
        self
    }

    /// Prints the failure to stderr: for people, or as one JSON object.
    pub fn print(&self, json: bool) {
        if self.exit == exit::PIPE {
            return;
        }
        let text = match printable::json(&self.to_json()) {
            Ok(text) if json => text,
            _ => self.to_string(),
        };
        // A closed stderr cannot be reported.
        io::Write::write_all(&mut io::stderr(), format!("{text}\n").as_bytes()).ok();
    }

    fn to_json(&self) -> serde_json::Value {
        json!({ "error": {
            "message": self.message,
            "reason": self.reason,
            "hint": self.hint,
            "retry_after_ms": self.retry_after.map(|delay| delay.as_millis() as u64),
        }})
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", printable(&self.message))?;
        if let Some(reason) = &self.reason {
            write!(f, " ({})", one_line(reason))?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\nhint: {}", printable(hint))?;
        }
        if let Some(delay) = self.retry_after {
            write!(
                f,
                "\nhint: the controller asks to wait {:.1} s before the next try",
                delay.as_secs_f64()
            )?;
        }
        Ok(())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self::local("the reader of the output has closed it").exit(exit::PIPE);
        }
        Self::local(format!("cannot write the output: {error}"))
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        io::Error::from(error).into()
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let retry_after = daemon::status::retry_after(&status);
        if let Some((reason, _)) = daemon::status::info(&status) {
            // Kept on one line, whatever the other side sends: the next line is ours.
            let message = status.message().trim_end_matches('.').replace('\n', " ");
            let transient = matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded);
            let failure = Self { retry_after, transient, ..Self::local(message) };
            return failure.with_reason(&reason);
        }
        Self { retry_after, ..unexplained(&status) }
    }
}

/// Words of TLS errors that another try does not change: the two sides do not trust each other.
const UNTRUSTED: &[&str] = &[
    "invalid peer certificate",
    "peer sent no certificates",
    "received fatal alert",
    "received corrupt message",
    "peer is incompatible",
];
/// Names of TLS alerts about a certificate that the other side has shown or not shown.
const REFUSED_CERTIFICATE: &[&str] = &["Certificate", "UnknownCA"];
/// Words of connections that end before TLS is agreed on: the controller does not keep up.
const BROKEN_HANDSHAKE: &[&str] =
    &["handshake eof", "reset by peer", "Broken pipe", "timed out", "deadline has elapsed"];
/// Words of HTTP/2 for a connection with too many frames or streams.
const REFUSED_BY_HTTP2: &[&str] = &["ENHANCE_YOUR_CALM", "too many", "too_many"];

/// Describes a status from elsewhere: a broken connection, a proxy, another program's port.
fn unexplained(status: &Status) -> Failure {
    let chain = causes(status);
    let unreached = sources(status).any(|error| error.is::<tonic::ConnectError>());
    if let Some(failure) = of_connection(status, &chain) {
        return Failure { unreached, ..failure };
    }
    let (exit, transient, hint) = match status.code() {
        Code::Unavailable => (
            exit::NOT_NOW,
            true,
            "check the endpoint (`sandboxctl context ls`, or SANDBOXCTL_ENDPOINT), and on that machine `systemctl status pve-sandbox-controller`",
        ),
        Code::Cancelled | Code::DeadlineExceeded => {
            (exit::NOT_NOW, true, "try again; `sandboxctl node ls` shows whether all nodes answer")
        }
        Code::Unimplemented => (
            exit::REFUSED,
            false,
            "`sandboxctl version` shows both versions: the controller is older than this program, or another program listens there",
        ),
        Code::Unauthenticated => (
            exit::USAGE,
            false,
            "set SANDBOXCTL_TOKEN or SANDBOXCTL_TOKEN_FILE to a token that the controller knows",
        ),
        Code::OutOfRange | Code::ResourceExhausted => (
            exit::REFUSED,
            false,
            "send less at once; large input goes through `sandboxctl exec -i` as a stream",
        ),
        Code::Ok
        | Code::Unknown
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::Internal
        | Code::DataLoss => (
            exit::REFUSED,
            // A connection that breaks in mid-stream has one of these two codes.
            matches!(status.code(), Code::Unknown | Code::Internal),
            "see the log of the controller: `journalctl -u pve-sandbox-controller`",
        ),
    };
    let what = if status.code() == Code::Unavailable {
        "cannot reach the controller"
    } else if exit == exit::NOT_NOW {
        "the controller did not answer in time"
    } else {
        "the controller answered with an unknown error"
    };
    let message = if chain.is_empty() { what.to_owned() } else { format!("{what}: {chain}") };
    Failure { transient, unreached, ..Failure::local(message).hint(hint).exit(exit) }
}

/// Describes a connection that was not made or not kept: the two sides do not trust each other, or
/// the controller does not keep up.
fn of_connection(status: &Status, chain: &str) -> Option<Failure> {
    let has = |words: &[&str]| words.iter().any(|word| chain.contains(word));
    // The controller says so after the handshake, in the place of the first answer.
    if has(&["received fatal alert"]) && has(REFUSED_CERTIFICATE) {
        return Some(Failure::usage(
            format!("the controller does not accept this client certificate: {chain}"),
            "only a certificate that `sandboxctl token create --certificate` of this controller has made is accepted, until it expires; make another, or use a token",
        ));
    }
    if status.code() == Code::Unavailable && has(UNTRUSTED) {
        return Some(Failure::usage(
            format!("the TLS connection to the controller failed: {chain}"),
            "SANDBOXCTL_CA must be the CA of this controller (without it the system's CAs count), and its certificate must have the name in SANDBOXCTL_ENDPOINT",
        ));
    }
    let refused = status.code() == Code::ResourceExhausted && has(REFUSED_BY_HTTP2);
    let broken = status.code() == Code::Unavailable && has(BROKEN_HANDSHAKE);
    (refused || broken).then(|| {
        let message = format!("the controller does not keep up, or is being started: {chain}");
        let next = "try again in a few seconds; if it stays so, check the endpoint (`sandboxctl context ls`, or SANDBOXCTL_ENDPOINT), and on that machine `systemctl status pve-sandbox-controller`";
        let failure = Failure::local(message).hint(next).exit(exit::NOT_NOW);
        Failure { transient: true, overloaded: true, ..failure }
    })
}

/// Messages of a status and its sources, without repetitions.
fn causes(status: &Status) -> String {
    let parts = std::iter::once(status.message().to_owned());
    let parts = parts.chain(sources(status).map(ToString::to_string));
    let mut said: Vec<String> = Vec::new();
    for part in parts {
        let noise =
            part.is_empty() || part == "transport error" || part.starts_with("client error");
        if !noise && !said.iter().any(|earlier| earlier.contains(&part)) {
            said.push(part);
        }
    }
    said.join(": ")
}

fn sources(status: &Status) -> impl Iterator<Item = &(dyn Error + 'static)> {
    std::iter::successors(status.source(), |error| (*error).source())
}

#[cfg(test)]
mod tests {
    use daemon::status::Refusal;
    use tonic_types::StatusExt as _;

    use super::*;

    #[test]
    fn every_reason_is_printed_with_a_hint() {
        for reason in Reason::all() {
            let status = Status::from(Refusal::new(reason, "it broke."));
            let failure = Failure::from(status);
            let text = failure.to_string();
            assert!(text.starts_with(&format!("error: it broke ({reason})\nhint: ")), "{text}");
            assert!(failure.exit != 0 && failure.exit != exit::EXEC, "{reason}");
        }
    }

    #[test]
    fn overload_is_not_told_as_a_wrong_ca() {
        for broken in [
            "tls handshake eof",
            "Connection reset by peer (os error 104)",
            "Connection timed out (os error 110)",
            "deadline has elapsed",
        ] {
            let failure = Failure::from(Status::unavailable(broken));
            assert_eq!(failure.exit, exit::NOT_NOW, "{failure}");
            assert!(failure.is_overload() && failure.transient, "{failure}");
            assert!(!failure.to_string().contains("SANDBOXCTL_CA"), "{failure}");
        }
        let calm = "h2 protocol error: ENHANCE_YOUR_CALM";
        assert!(Failure::from(Status::resource_exhausted(calm)).is_overload());
        for wrong in
            ["invalid peer certificate: UnknownIssuer", "received corrupt message of type X"]
        {
            let failure = Failure::from(Status::unavailable(wrong));
            assert_eq!(failure.exit, exit::USAGE, "{failure}");
            assert!(failure.to_string().contains("SANDBOXCTL_CA"), "{failure}");
        }
        // After the handshake, so it has the code of a stream that broke.
        for alert in ["CertificateUnknown", "CertificateExpired", "UnknownCA", "BadCertificate"] {
            let alert = format!("connection error: received fatal alert: {alert}");
            let failure = Failure::from(Status::unknown(alert));
            assert_eq!((failure.exit, failure.transient), (exit::USAGE, false), "{failure}");
            assert!(failure.to_string().contains("--certificate"), "{failure}");
        }
        let gone = Failure::from(Status::unavailable("Connection refused (os error 111)"));
        assert!(gone.exit == exit::NOT_NOW && !gone.is_overload(), "{gone}");
        let calls = Failure::from(Status::from(Refusal::new(Reason::TooManyCalls, "too many")));
        assert!(calls.exit == exit::NOT_NOW && calls.is_overload(), "{calls}");
    }

    #[test]
    fn hint_fits_the_verb() {
        let unknown = Refusal::new(Reason::OutcomeUnknown, "who knows");
        let failure = Failure::from(Status::from(unknown));
        assert!(failure.hint.as_deref().is_some_and(|hint| hint.contains("--exec-id")));
        let hint = failure.repeatable().hint.expect("a hint");
        assert!(hint.contains("run again") && !hint.contains("--request-id"), "{hint}");
        let late = Failure::deadline("the controller did not answer", Duration::from_secs(30));
        assert!(!late.hint.clone().expect("a hint").contains("--request-id"));
        assert!(late.repeatable().hint.expect("a hint").contains("run again"));
        let locked = Refusal::new(Reason::ContainerLocked, "a backup");
        let locked = Failure::from(Status::from(locked));
        assert_eq!(locked.clone().repeatable().hint, locked.hint, "what is decided stays so");
        assert!(!locked.is_of_a_restart());
        for reason in [Reason::NodeUnreachable, Reason::ShuttingDown] {
            assert!(Failure::of_reason(reason, "away").is_of_a_restart());
        }
    }

    #[test]
    fn revoked_node_is_not_waited_for() {
        let failure = Failure::from(Status::from(Refusal::new(Reason::NodeRevoked, "revoked")));
        assert!(!failure.transient && !failure.is_of_a_restart() && !failure.is_overload());
        assert_eq!(failure.exit, exit::REFUSED, "waiting does not help");
    }

    #[test]
    fn unknown_reason_of_a_later_version_is_shown() {
        let mut details = tonic_types::ErrorDetails::new();
        details.set_error_info(
            "BRAND_NEW",
            proto::reason::DOMAIN,
            std::collections::HashMap::new(),
        );
        let status = Status::with_error_details(Code::Internal, "it broke", details);
        assert_eq!(Failure::from(status).to_string(), "error: it broke (BRAND_NEW)");
    }

    #[test]
    fn retry_delay_is_printed() {
        let refusal =
            Refusal::new(Reason::NoCapacity, "no room").retry_after(Duration::from_millis(1500));
        let failure = Failure::from(Status::from(refusal));
        assert_eq!((failure.exit, failure.transient), (exit::NOT_NOW, false));
        assert!(failure.to_string().contains("wait 1.5 s"), "{failure}");
        assert_eq!(failure.to_json()["error"]["retry_after_ms"], 1500);
    }

    #[test]
    fn control_characters_from_the_wire_are_not_printed() {
        let status = Status::from(Refusal::new(Reason::PctFailed, "a\x1b[2Jb"));
        assert!(!Failure::from(status).to_string().contains('\x1b'));
        let text = "no sandbox \u{202e}gpj.exe\u{200b} here";
        let status = Status::from(Refusal::new(Reason::SandboxNotFound, text));
        let failure = Failure::from(status);
        for shown in [failure.to_string(), printable::json(&failure.to_json()).expect("JSON")] {
            assert!(!shown.contains(['\u{202e}', '\u{200b}']), "{shown:?}");
        }
    }

    #[test]
    fn failed_creation_shows_what_the_rollback_did() {
        let failure = Failure::recorded(&proto::sandbox::v1::Failure {
            reason: Reason::PctFailed.into(),
            message: "start failed: no such device".into(),
            rollback: "destroyed".into(),
        });
        let text = failure.to_string();
        assert!(
            text.contains("start failed: no such device; rollback: destroyed (PCT_FAILED)"),
            "{text}"
        );
    }
}
