//! `set`: changes the metadata of a sandbox, key by key.

use std::{collections::BTreeMap, str::FromStr};

use clap::Args;
use proto::{sandbox::v1::Sandbox, update};

use super::targets::One;
use crate::{
    client::{Controller, patient, promised},
    failure::Failure,
    output::{Output, json},
};

/// Arguments of `set`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl set ID user=ada ticket=1817        other metadata stays as it is
  sandboxctl set ID ticket-                     removes it

`sandboxctl ls --filter meta.user=ada` finds it again.")]
pub(crate) struct Set {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// KEY=VALUE sets a pair, KEY- removes it
    #[arg(required = true, value_name = "KEY=VALUE")]
    changes: Vec<Change>,
}

/// Change of one pair; without a value the pair is removed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Change {
    key: String,
    value: Option<String>,
}

impl FromStr for Change {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = match text.split_once('=') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => {
                (text.strip_suffix('-').ok_or("must be KEY=VALUE, or KEY- to remove it")?, None)
            }
        };
        if key.is_empty() {
            return Err("must have a key before the = or the -".into());
        }
        Ok(Self { key: key.to_owned(), value })
    }
}

pub(super) async fn run(
    controller: Controller,
    Set { sandbox: One { id }, changes }: Set,
    output: Output,
) -> Result<u8, Failure> {
    let fields: Vec<_> = changes.iter().map(|change| format!("metadata.{}", change.key)).collect();
    let fields: Vec<_> = fields.iter().map(String::as_str).collect();
    let pairs = changes
        .iter()
        .filter_map(|change| change.value.clone().map(|value| (change.key.clone(), value)));
    let metadata: BTreeMap<_, _> = pairs.collect();
    let request = update::request(Sandbox { id, metadata, ..Sandbox::default() }, &fields);
    let call = || {
        let (mut client, request) = (controller.sandboxes.clone(), request.clone());
        async move { client.update_sandbox(request).await }
    };
    let sandbox = promised(patient(call).await?.sandbox)?;
    if output.json {
        output.value(&json::sandbox(&sandbox))?;
    } else {
        let pairs: Vec<_> =
            sandbox.metadata.iter().map(|(key, value)| format!("{key}={value}")).collect();
        output.line(format!("{} {}", sandbox.id, pairs.join(" ")))?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_set_or_remove_a_key() {
        let set = |key: &str, value: Option<&str>| {
            Ok(Change { key: key.into(), value: value.map(ToOwned::to_owned) })
        };
        assert_eq!("a=b=c".parse(), set("a", Some("b=c")));
        assert_eq!("a=".parse(), set("a", Some("")));
        assert_eq!("a-b-".parse(), set("a-b", None));
        for wrong in ["", "a", "=b", "-"] {
            wrong.parse::<Change>().expect_err(wrong);
        }
    }
}
