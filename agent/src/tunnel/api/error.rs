//! Errors of Cloudflare's API, in the words of what the operator can do.

use std::{fmt, time::Duration};

use daemon::web;

use super::model::Problem;

/// Permission of a token, by the words of Cloudflare's dashboard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permission {
    /// To make and to read tunnels.
    TunnelEdit,
    /// To make and to read DNS records.
    DnsEdit,
    /// To find a zone.
    ZoneRead,
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TunnelEdit => "Account > Cloudflare Tunnel > Edit",
            Self::DnsEdit => "Zone > DNS > Edit",
            Self::ZoneRead => "Zone > Zone > Read",
        })
    }
}

/// Reason why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No client can be made.
    #[error("Cloudflare cannot be called")]
    Client(#[source] daemon::tls::Error),
    /// The base address must not get a token.
    #[error("{0} gets no token: the address must be https, or http on this machine")]
    Base(String),
    /// The token is empty or has characters that no token has.
    #[error("the API token has a form that no token has: is the file the right one?")]
    TokenForm,
    /// Cloudflare does not answer.
    #[error("{call}: Cloudflare does not answer")]
    Web {
        /// Call.
        call: String,
        /// Reason.
        source: web::Error,
    },
    /// The answer has another shape.
    #[error("{call}: the answer has an unknown form: {why}")]
    Malformed {
        /// Call.
        call: String,
        /// Reason.
        why: String,
    },
    /// The token itself is not accepted.
    #[error(
        "Cloudflare does not accept the API token: it is {state}{}; make another at dash.cloudflare.com, \
         My Profile > API Tokens",
        texts(.problems)
    )]
    Token {
        /// State of the token, for people.
        state: String,
        /// Reasons.
        problems: Vec<Problem>,
    },
    /// The token lacks a permission.
    #[error(
        "the API token lacks a permission: {permission}{}; add it at dash.cloudflare.com, My Profile > API \
         Tokens ({call}{})",
        if *.permission == Permission::ZoneRead { " (or give --zone-id and --account-id)" } else { "" },
        texts(.problems)
    )]
    Lacks {
        /// Permission.
        permission: Permission,
        /// Call.
        call: String,
        /// Reasons.
        problems: Vec<Problem>,
    },
    /// Cloudflare asks to wait longer than a command does.
    #[error("Cloudflare takes no more calls now; try again in {} s", .0.as_secs())]
    Busy(Duration),
    /// A list is longer than is read.
    #[error("{0}: the list is too long")]
    TooLong(String),
    /// The call was refused.
    #[error("{call}: Cloudflare refused it ({status}){}", texts(.problems))]
    Refused {
        /// Call.
        call: String,
        /// HTTP status.
        status: u16,
        /// Reasons.
        problems: Vec<Problem>,
    },
}

/// Codes of an A, AAAA or CNAME record that is there already, and of the very same one.
const RECORD_TAKEN: &[u32] = &[81_053, 81_057, 81_058];
/// Code of a tunnel's name that is taken.
const NAME_TAKEN: u32 = 1013;
/// Codes of a tunnel that still has connections.
const STILL_CONNECTED: u32 = 1022;

impl Error {
    /// Returns true when a tunnel of this name is there already.
    pub fn is_name_taken(&self) -> bool {
        self.has(&[NAME_TAKEN])
    }

    /// Returns true when a record of this name is there already.
    pub fn is_record_taken(&self) -> bool {
        self.has(RECORD_TAKEN)
    }

    /// Returns true when the tunnel has connections, so that it is not deleted.
    pub fn is_still_connected(&self) -> bool {
        self.has(&[STILL_CONNECTED])
    }

    /// Returns true when the object is not there.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
    }

    fn has(&self, codes: &[u32]) -> bool {
        let Self::Refused { problems, .. } = self else { return false };
        problems.iter().any(|problem| codes.contains(&problem.code))
    }
}

/// Longest text of Cloudflare's that is shown, characters.
const TEXT_MAX: usize = 300;

fn texts(problems: &[Problem]) -> String {
    let shown = problems.iter().take(5);
    shown.map(|problem| format!(": {} ({})", plain(&problem.message), problem.code)).collect()
}

/// Returns a text of Cloudflare's as it may be shown: bounded, and without control characters.
pub(super) fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(TEXT_MAX).collect()
}
