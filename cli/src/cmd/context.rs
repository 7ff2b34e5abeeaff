//! `context`: lists the saved contexts, chooses one of them, removes one.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::{
    config_file::{self, Context, File},
    failure::Failure,
    listing::Listing,
    output::{
        Output,
        layout::{Column, Fit},
        table::{self, Table},
    },
    settings::Connection,
};

/// Verbs of `context`.
#[derive(Debug, Subcommand)]
pub(crate) enum ContextVerb {
    /// List the contexts
    #[command(
        visible_alias = "list",
        after_help = "\
Examples:
  sandboxctl context ls
  sandboxctl context ls -o wide                 also where CA and token are"
    )]
    Ls(Listing),
    /// Use a context from now on
    #[command(after_help = "\
Examples:
  sandboxctl context use lab
  sandboxctl --context lab ls                   for one call
  export SANDBOXCTL_CONTEXT=lab                 for one shell

SANDBOXCTL_ENDPOINT, SANDBOXCTL_TOKEN and the like win over a context that no
flag names.")]
    Use(Named),
    /// Remove a context, and the token that its login saved
    #[command(after_help = "\
Examples:
  sandboxctl context rm lab")]
    Rm(Named),
}

/// Arguments of a verb for one context.
#[derive(Debug, Args)]
pub(crate) struct Named {
    /// Name of the context
    #[arg(value_name = "NAME")]
    context_name: String,
}

const COLUMNS: &[Column] = &[
    Column::new("NAME").fit(Fit::Cut(12)),
    Column::new("USED"),
    Column::new("ENDPOINT").fit(Fit::Cut(20)),
    Column::new("TEAM").rank(1).fit(Fit::Cut(8)),
    Column::new("CA").extra(),
    Column::new("TOKEN FILE").extra(),
];

pub(super) fn run(
    connection: &Connection,
    verb: ContextVerb,
    output: Output,
) -> Result<u8, Failure> {
    let config = connection.config.as_deref();
    let file = config_file::read(config)?;
    match verb {
        ContextVerb::Ls(listing) => ls(&file, connection, &listing, output)?,
        ContextVerb::Use(Named { context_name: name }) => {
            file.named(&name)?;
            config_file::choose(config, &name)?;
            done(&name, "is used from now on", output)?;
            if connection.endpoint.is_some() {
                output.note(
                    "SANDBOXCTL_ENDPOINT is set, and wins over it: unset it to use the context",
                );
            }
        }
        ContextVerb::Rm(Named { context_name: name }) => {
            file.named(&name)?;
            config_file::remove(config, &name)?;
            done(&name, "removed", output)?;
        }
    }
    Ok(0)
}

fn done(name: &str, what: &str, output: Output) -> Result<(), Failure> {
    match output.json {
        true => output.value(&json!({ "id": name })),
        false => output.line(format!("{name} {what}")),
    }
}

fn ls(
    file: &File,
    connection: &Connection,
    listing: &Listing,
    output: Output,
) -> Result<(), Failure> {
    let chosen = connection.context.as_ref().or(file.context.as_ref());
    let (table, values) = rows(file, chosen);
    listing.print(output, table, &values, "no contexts; `sandboxctl login` makes one")
}

/// Contexts as a table and as JSON.
fn rows(file: &File, chosen: Option<&String>) -> (Table, Vec<Value>) {
    let mut table = Table::new(COLUMNS);
    let mut values = Vec::new();
    for (name, context) in &file.contexts {
        let used = chosen == Some(name);
        let path = |path: &Option<PathBuf>| {
            let text = path.as_ref().map(|path| path.to_string_lossy());
            table::cell(text.unwrap_or_default())
        };
        table.row(vec![
            table::cell(name),
            table::cell(if used { "yes" } else { "" }),
            table::cell(context.endpoint.as_deref().unwrap_or_default()),
            table::cell(context.team.as_deref().unwrap_or_default()),
            path(&context.ca),
            path(if context.client_cert.is_some() {
                &context.client_cert
            } else {
                &context.token_file
            }),
        ]);
        values.push(value(name, context, used));
    }
    (table, values)
}

/// JSON of a context.
pub(super) fn value(name: &str, context: &Context, used: bool) -> Value {
    json!({
        "id": name,
        "used": used,
        "endpoint": context.endpoint,
        "team": context.team,
        "ca": context.ca,
        "token_file": context.token_file,
        "client_cert": context.client_cert,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Table of contexts with long values, for the screens.
    pub(in crate::cmd) fn screen() -> Table {
        let context = |endpoint: &str| Context {
            endpoint: Some(endpoint.into()),
            token_file: Some("/root/.config/sandboxctl/tokens/lab".into()),
            ca: Some("/etc/pve-sandbox/ca.pem".into()),
            client_cert: None,
            team: Some("platform-engineering".into()),
        };
        let mut file = File { context: Some("lab".into()), ..File::default() };
        for (name, endpoint) in [
            ("lab", "https://10.0.0.1:7443"),
            ("production-frankfurt", "https://sandboxes.frankfurt.production.example.com:7443"),
        ] {
            file.contexts.insert(name.into(), context(endpoint));
        }
        rows(&file, file.context.as_ref()).0
    }
}
