//! Questions on the terminal, whose answers are short lines. A signal ends the question, and the
//! terminal is as it was.

use std::io::{self, BufRead, IsTerminal, Read, Write};

use crate::{failure::Failure, printable::printable, signals::Stops, terminal};

/// Longest answer.
const ANSWER_MAX: u64 = 8192;

/// Whether there is somebody to ask.
pub fn is_possible() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks for a line.
///
/// # Errors
/// When there is no answer.
pub async fn line(question: &str) -> Result<String, Failure> {
    asked(question, Stops::listen()?).await
}

/// Asks for a line that is not shown while it is typed.
///
/// # Errors
/// When there is no answer, or the terminal cannot be switched.
pub async fn secret(question: &str) -> Result<String, Failure> {
    // Before the terminal is changed: a signal must find it as it was.
    let stops = Stops::listen()?;
    let hidden = terminal::Hidden::enter()
        .map_err(|error| Failure::local(format!("cannot use the terminal: {error}")))?;
    let answer = asked(question, stops).await;
    drop(hidden);
    if answer.is_ok() {
        // The end of the line was not shown either.
        io::stderr().write_all(b"\n").ok();
    }
    answer
}

async fn asked(question: &str, mut stops: Stops) -> Result<String, Failure> {
    io::stderr().write_all(printable(question).as_bytes())?;
    tokio::select! {
        // A read of the terminal cannot be cancelled; its thread ends with us.
        line = tokio::task::spawn_blocking(first_line) => {
            let line = line.map_err(|error| Failure::local(format!("cannot ask: {error}")))??;
            line.ok_or_else(|| Failure::local("there was no answer"))
        }
        stop = stops.next() => {
            io::stderr().write_all(b"\n").ok();
            Err(Failure::local("interrupted").exit(stop.exit()))
        }
    }
}

/// First line of stdin, without the spaces around it; none at its end.
///
/// # Errors
/// When it cannot be read.
pub fn first_line() -> Result<Option<String>, Failure> {
    let mut line = String::new();
    let read = io::stdin().lock().take(ANSWER_MAX).read_line(&mut line);
    match read {
        Ok(0) => Ok(None),
        Ok(_) => Ok(Some(line.trim().to_owned())),
        Err(error) => Err(Failure::local(format!("cannot read stdin: {error}"))),
    }
}
