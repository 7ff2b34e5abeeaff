//! Commands, terminals and file transfers of a session: carried between an SSH channel and the sandbox, the
//! way that `sandboxctl exec` goes.

use std::{collections::BTreeMap, sync::Arc};

use futures_util::{StreamExt, stream};
use proto::{
    Reason,
    id::Invalid,
    sandbox::v1::{
        Argv, ExecExit, ExecRequest, ExecStart, SftpServer, WindowSize, exec_request,
        exec_response, exec_start,
    },
};
use russh::{
    ChannelWriteHalf, Sig,
    server::{Handle, Msg},
};

use super::{
    inputs::{Input, Inputs},
    record::Action,
    session::Session,
};
use crate::sandbox::{Error, Result};

/// Number of stderr among the extended data of a channel.
const STDERR: u32 = 1;
/// Exit code of a command that could not be run, as `ssh` itself has it.
const FAILED: u32 = 255;
/// Exit code of a shell that does not find a program.
const NOT_FOUND: u32 = 127;
/// Finds the user's shell, as `$s`.
const SHELL: &str = "s=$(getent passwd \"$(id -u)\" 2>/dev/null | cut -d: -f7); \
    [ -x \"$s\" ] || s=$(command -v bash || echo /bin/sh)";
/// Most characters of a title: no list shows more.
const TITLE_MAX: usize = 200;
/// Advice where the sandbox has no `scp` for a client that speaks the old protocol.
const OLD_SCP: &str = "pve-sandbox: the sandbox has no scp, which scp of OpenSSH before 9.0 needs \
    there: use `scp -s` (from OpenSSH 8.7 on), sftp or rsync\r\n";

/// Program that a client asks for.
#[derive(Debug)]
pub(super) enum Program {
    /// A line for a shell.
    Line(Vec<u8>),
    /// The login shell.
    Shell,
    /// An SFTP server.
    Sftp,
}

impl Program {
    const fn action(&self) -> Action {
        match self {
            Self::Line(_) => Action::Exec,
            Self::Shell => Action::Shell,
            Self::Sftp => Action::Sftp,
        }
    }

    /// Builds the command, and its title for lists.
    fn command(self) -> Result<(exec_start::Command, String)> {
        Ok(match self {
            Self::Line(line) => {
                let line = String::from_utf8(line);
                let line = line.map_err(|_| Invalid::new("command", "must be UTF-8"))?;
                let title = line.chars().take(TITLE_MAX).collect();
                (in_shell("-c \"$1\"", Some(line)), title)
            }
            Self::Shell => (in_shell("-l", None), "(login shell)".to_owned()),
            Self::Sftp => (exec_start::Command::Sftp(SftpServer {}), String::new()),
        })
    }

    /// Returns true for the old protocol of `scp`, which runs another `scp` on the server.
    fn is_old_scp(&self) -> bool {
        let Self::Line(line) = self else { return false };
        let mut words = line.split(u8::is_ascii_whitespace);
        words.next() == Some(&b"scp"[..]) && words.any(|word| matches!(word, b"-t" | b"-f"))
    }
}

/// Builds the command that becomes the user's shell with these options, and `line` as `$1`.
fn in_shell(options: &str, line: Option<String>) -> exec_start::Command {
    let script = format!("{SHELL}; exec \"$s\" {options}");
    let args = ["/bin/sh", "-c", &script, "sh"].map(str::to_owned);
    exec_start::Command::Argv(Argv { args: args.into_iter().chain(line).collect() })
}

/// Requests of a client about a command, before it starts.
#[derive(Debug, Default)]
pub(super) struct Requested {
    pub(super) env: BTreeMap<String, String>,
    /// Size of the terminal, where there is to be one.
    pub(super) window: Option<WindowSize>,
}

/// Channel of a session.
pub(super) struct Ends {
    pub(super) out: ChannelWriteHalf<Msg>,
    pub(super) handle: Handle,
    pub(super) inputs: Inputs,
}

/// Runs a program to its end, and closes the channel.
pub(super) async fn run(session: Arc<Session>, program: Program, requested: Requested, ends: Ends) {
    let Ends { out, handle, inputs } = ends;
    let (action, is_old_scp) = (program.action(), program.is_old_scp());
    let ready = program.command().and_then(|command| Ok((command, session.enter()?)));
    let carried = match ready {
        Ok((command, permit)) => {
            let entry = session.begin(action);
            // The end of the input alone would be the end of stdin: a client that has closed the channel hangs up.
            let gone = inputs.gone();
            let carried = Box::pin(carry(&session, command, requested, &out, inputs));
            let carried = session.until_closed(gone.run_until_cancelled(carried)).await.flatten();
            let how = match &carried {
                Some(Ok(Some(_))) => Some(Ok(())),
                Some(Err(error)) => Some(Err(error)),
                Some(Ok(None)) | None => None,
            };
            entry.end(session.shared(), how);
            drop(permit);
            carried
        }
        Err(error) => {
            session.refuse(action, &error);
            Some(Err(error))
        }
    };
    let told = async {
        match carried {
            Some(Ok(Some(exit))) => {
                if is_old_scp && exit.code == NOT_FOUND {
                    out.extended_data_bytes(STDERR, OLD_SCP).await?;
                }
                tell(&handle, &out, exit).await
            }
            Some(Err(error)) => {
                let text = format!("pve-sandbox: {error}\r\n");
                out.extended_data_bytes(STDERR, text).await?;
                out.exit_status(FAILED).await
            }
            Some(Ok(None)) | None => Ok(()),
        }?;
        out.eof().await?;
        out.close().await
    };
    // A client that has gone need not be told.
    drop(session.until_closed(told).await);
}

/// Carries bytes both ways. `None`: the connection has gone.
async fn carry(
    session: &Session,
    (command, title): (exec_start::Command, String),
    requested: Requested,
    out: &ChannelWriteHalf<Msg>,
    inputs: Inputs,
) -> Result<Option<ExecExit>> {
    let Requested { env, window } = requested;
    let is_sftp = matches!(command, exec_start::Command::Sftp(_));
    session.wake().await?;
    let start = ExecStart {
        id: session.sandbox(),
        command: Some(command),
        env: env.into_iter().collect(),
        tty: window.is_some() && !is_sftp,
        window: window.filter(|_| !is_sftp),
        // A client that has gone may come back to what it left in the background, such as tmux.
        spare_background: true,
        title,
        ..ExecStart::default()
    };
    let first = ExecRequest { message: Some(exec_request::Message::Start(start)) };
    let rest = stream::unfold(inputs, |mut inputs| async {
        let message = match inputs.next().await? {
            Input::Data(bytes) => exec_request::Message::Stdin(bytes),
            Input::Eof => exec_request::Message::StdinEof(true),
            Input::Resize(window) => exec_request::Message::Resize(window),
            Input::Signal(number) => exec_request::Message::Signal(number),
        };
        Some((Ok(ExecRequest { message: Some(message) }), inputs))
    });
    let input = stream::iter([Ok(first)]).chain(rest).boxed();
    let mut output = session.shared().sandboxes.exec(session.team(), input).await?;
    while let Some(message) = output.next().await {
        let sent = match message?.message {
            Some(exec_response::Message::Stdout(bytes)) => out.data_bytes(bytes).await,
            Some(exec_response::Message::Stderr(bytes)) => {
                out.extended_data_bytes(STDERR, bytes).await
            }
            Some(exec_response::Message::Exit(exit)) => return Ok(Some(exit)),
            Some(exec_response::Message::Started(_)) | None => Ok(()),
        };
        if sent.is_err() {
            return Ok(None);
        }
    }
    Err(Error::new(Reason::OutcomeUnknown, "the command's stream had no end"))
}

/// Tells the client how the command ended.
async fn tell(
    handle: &Handle,
    out: &ChannelWriteHalf<Msg>,
    exit: ExecExit,
) -> Result<(), russh::Error> {
    match signal_name(exit.signal) {
        Some(signal) if !exit.timed_out => {
            let told =
                handle.exit_signal_request(out.id(), signal, false, String::new(), String::new());
            told.await.map_err(|()| russh::Error::SendError)
        }
        _ => out.exit_status(exit.code).await,
    }
}

/// Signals that SSH has names for, with their numbers.
fn signals() -> [(u32, Sig); 13] {
    [
        (1, Sig::HUP),
        (2, Sig::INT),
        (3, Sig::QUIT),
        (4, Sig::ILL),
        (6, Sig::ABRT),
        (8, Sig::FPE),
        (9, Sig::KILL),
        (10, Sig::USR1),
        (11, Sig::SEGV),
        (12, Sig::Custom("USR2".to_owned())),
        (13, Sig::PIPE),
        (14, Sig::ALRM),
        (15, Sig::TERM),
    ]
}

fn signal_name(number: u32) -> Option<Sig> {
    signals().into_iter().find(|(known, _)| *known == number).map(|(_, signal)| signal)
}

/// Returns the number of a client's signal; `None` for one that is not passed on.
pub(super) fn signal_number(signal: &Sig) -> Option<u32> {
    let name = |signal: &Sig| format!("{signal:?}");
    let known = signals().into_iter().find(|(_, known)| name(known) == name(signal));
    known.map(|(number, _)| number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_their_numbers_in_both_directions() {
        for (number, signal) in signals() {
            assert_eq!(signal_number(&signal), Some(number));
            assert!(signal_name(number).is_some());
        }
        assert_eq!(signal_number(&Sig::Custom("STOP@x".to_owned())), None);
        assert!(signal_name(0).is_none());
    }

    #[test]
    fn old_scp_is_told_from_other_lines() {
        let is_old = |line: &str| Program::Line(line.into()).is_old_scp();
        for line in ["scp -t /root", "scp -r -p -f -- a b", "scp -v -d -t ."] {
            assert!(is_old(line), "{line}");
        }
        for line in ["scp", "scp a b:c", "scp -true", "rsync -t", "scpx -t", "echo scp -t"] {
            assert!(!is_old(line), "{line}");
        }
        assert!(!Program::Shell.is_old_scp() && !Program::Sftp.is_old_scp());
    }
}
