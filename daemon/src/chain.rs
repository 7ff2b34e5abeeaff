//! Formats an error with all its causes on one line. Our own `Display`s never repeat their source,
//! so a log line needs this to show the causes.

use std::{error::Error, fmt};

/// Displays `a: b: c`.
#[derive(Debug)]
pub struct Chain<'a>(pub &'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&with_causes(self.0.to_string(), self.0.source()))
    }
}

/// Adds causes to a message, except those that it contains: errors of others repeat theirs.
pub fn with_causes(mut message: String, mut cause: Option<&(dyn Error + 'static)>) -> String {
    while let Some(error) = cause {
        let next = error.to_string();
        if !message.contains(&next) {
            message = format!("{message}: {next}");
        }
        cause = error.source();
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Told(&'static str, #[source] Option<Box<Told>>);

    #[test]
    fn every_cause_is_told_once() {
        let told = |text, cause: Option<Told>| Told(text, cause.map(Box::new));
        let last = told("no route", None);
        let error = told("no answer", Some(told("connect: no route", Some(last))));
        assert_eq!(Chain(&error).to_string(), "no answer: connect: no route");
    }
}
