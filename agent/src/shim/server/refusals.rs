//! Reasons and sentences of what a shim refuses.

use helper::Refusal;
use proto::{Reason, shim::v1 as wire};

use crate::shim::helper::Failure;

pub(super) type Refused = wire::Refused;

pub(super) fn refused(reason: Reason, message: impl Into<String>) -> Refused {
    Refused { reason: reason.name().to_owned(), message: message.into() }
}

pub(super) struct NotStarted {
    pub(super) refused: Refused,
    /// True when nothing was run, and nothing will be.
    pub(super) certain: bool,
}

pub(super) fn other(exec_id: &str) -> Refused {
    refused(Reason::ExecIdReused, format!("{exec_id} was another command"))
}

pub(super) fn lost(exec_id: &str) -> Refused {
    refused(
        Reason::ExecLost,
        format!(
            "{exec_id} was started before, and its end is not known any more; it is not run again"
        ),
    )
}

/// Refusal when the helper has neither refused the order nor died.
pub(super) fn unknown() -> Refused {
    refused(
        Reason::OutcomeUnknown,
        "the sandbox has not said whether the command runs; it is frozen or overloaded, and the \
         command may have been started",
    )
}

pub(super) fn why(failure: Failure) -> NotStarted {
    let refused = match failure {
        Failure::Refused(Refusal::NoUser) => {
            refused(Reason::FieldInvalid, "user: there is no such user in the sandbox")
        }
        Failure::Refused(Refusal::NoCwd) => {
            refused(Reason::FieldInvalid, "cwd: there is no such directory in the sandbox")
        }
        Failure::Refused(Refusal::NoTerminal) => {
            refused(Reason::ExecFailed, "the sandbox gives no terminal")
        }
        Failure::Refused(Refusal::NoProcess) => refused(
            Reason::ExecFailed,
            "the sandbox lets nothing be started: it has too many processes or too little memory",
        ),
        Failure::Refused(Refusal::NotListening) => {
            refused(Reason::NotListening, "nothing in the sandbox accepts connections there")
        }
        Failure::Refused(Refusal::NoConnection) => refused(
            Reason::NotListening,
            "the connection is gone: it was taken already, or its listener has ended",
        ),
        Failure::Refused(Refusal::NotConnected) => refused(
            Reason::ForwardRefused,
            "the sandbox does not allow it, or the path is no socket of streams",
        ),
        Failure::Refused(Refusal::PortTaken) => {
            refused(Reason::ForwardRefused, "another program in the sandbox listens on the port")
        }
        Failure::Gone(why) => refused(Reason::ExecFailed, why),
        Failure::Refused(Refusal::TooLate) | Failure::Stuck => refused(
            Reason::ExecFailed,
            "the command was not run: the sandbox did not get to it in time; it is frozen or \
             overloaded",
        ),
        Failure::Lost => {
            let message = "what starts commands inside the sandbox was killed while it started \
                           this one, which may have run in part; it is not run again";
            return NotStarted { refused: refused(Reason::ExecLost, message), certain: false };
        }
    };
    NotStarted { refused, certain: true }
}
