//! `login`: learns which controller to use and as whom, checks it with one call, and saves it as a
//! context.

use std::path::{Path, PathBuf};

use clap::Args;
use proto::sandbox::v1::ListSandboxesRequest;

use crate::{
    ask,
    client::{self, Controller},
    config_file::{self, Context},
    failure::Failure,
    output::Output,
    settings::{Connection, Credential, HOW, Settings, check_endpoint, read_token},
};

/// Arguments of `login`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl login                            asks for what it needs; the token
                                              is not shown
  sandboxctl login lab --endpoint https://pve1:7443 --ca ca.pem --token-file t
  pass show lab | sandboxctl login lab --endpoint https://pve1:7443 --ca ca.pem
  sandboxctl login lab --client-cert own.pem  with a client certificate, which
                                              stays where it is
  sandboxctl login lab                        a new token for a context that is
                                              there

Nothing is saved unless the controller accepts the token. The token goes into a
file of its own, which only you can read. The context is used from then on: see
`context`.")]
pub(crate) struct Login {
    /// Name of the context [default: the host in the endpoint]
    name: Option<String>,
}

pub(super) async fn run(
    connection: &Connection,
    login: Login,
    output: Output,
) -> Result<u8, Failure> {
    let config = connection.config.as_deref();
    let mut known = config_file::read_or_empty(config)?.contexts;
    let typed = connection.without_environment();
    let name = login.name.or_else(|| typed.context.clone());
    // The environment is that of another controller, most likely: it neither changes a context that is
    // there, nor completes another endpoint.
    let is_there = name.as_ref().is_some_and(|name| known.contains_key(name));
    let connection = if is_there || typed.endpoint.is_some() { &typed } else { connection };
    let old = name.as_ref().and_then(|name| known.remove(name)).unwrap_or_default();
    let is_new = old.endpoint.is_none();
    let endpoint = match connection.endpoint.clone().or(old.endpoint) {
        Some(endpoint) => endpoint,
        None => asked_endpoint().await?,
    };
    // Before the next question.
    check_endpoint(&endpoint)?;
    let name = name.unwrap_or_else(|| host(&endpoint));
    if !config_file::is_name(&name) {
        let message = format!("{name:?} cannot be the name of a context");
        let hint = "give one of letters, digits, dots and dashes: `sandboxctl login NAME`";
        return Err(Failure::usage(message, hint));
    }
    let ca = match connection.ca.clone().or(old.ca) {
        Some(ca) => Some(ca),
        None if is_new && ask::is_possible() => {
            let question = "CA of its certificate (a PEM file; none for a public one): ";
            Some(ask::line(question).await?).filter(|ca| !ca.is_empty()).map(PathBuf::from)
        }
        None => None,
    };
    let ca = ca.map(|ca| std::path::absolute(&ca).unwrap_or(ca));
    ca.as_deref().map(check_file).transpose()?;
    let client_cert = connection.client_cert.as_deref();
    let client_cert =
        client_cert.map(|own| std::path::absolute(own).unwrap_or_else(|_| own.to_owned()));
    let credential = match &client_cert {
        Some(own) => Credential::Certificate(own.clone()),
        None => Credential::Token(token(connection).await?),
    };
    let settings = Settings::new(&endpoint, credential, ca.clone(), connection.debug)?;
    let team = team(&Controller::new(&settings)?).await?;
    let mut new = Context { endpoint: Some(endpoint), ca, team, token_file: None, client_cert };
    new.token_file = config_file::save(config, &name, new.clone(), settings.credential.token())?;
    report(&name, &new, output)
}

fn report(name: &str, new: &Context, output: Output) -> Result<u8, Failure> {
    if output.json {
        output.value(&super::context::value(name, new, true))?;
        return Ok(0);
    }
    let endpoint = new.endpoint.as_deref().unwrap_or_default();
    let team = new.team.as_ref().map(|team| format!(" as team {team}")).unwrap_or_default();
    output
        .line(format!("logged in to {endpoint}{team}; the context {name} is used from now on"))?;
    Ok(0)
}

/// Endpoint that a person types.
async fn asked_endpoint() -> Result<String, Failure> {
    if !ask::is_possible() {
        return Err(Failure::usage(
            "the endpoint of the controller is not given",
            "give --endpoint and --token-file, or run this on a terminal, which asks for them",
        ));
    }
    let answer = ask::line("Endpoint of the controller (https://host:port): ").await?;
    if answer.is_empty() {
        return Err(Failure::usage("the endpoint of the controller is empty", HOW));
    }
    Ok(answer)
}

fn check_file(ca: &Path) -> Result<(), Failure> {
    let opened = std::fs::File::open(ca).map(drop);
    opened.map_err(|error| {
        let message = format!("cannot read the CA in {}: {error}", ca.display());
        Failure::usage(message, "--ca must name the PEM file of the controller's CA")
    })
}

/// Token from a flag or the environment, else from stdin: on a terminal it is asked for, and not shown.
async fn token(connection: &Connection) -> Result<String, Failure> {
    let from_stdin = connection.token_file.as_deref() == Some(Path::new("-"));
    match (&connection.token, &connection.token_file) {
        (Some(token), _) => Ok(token.clone().reveal()),
        (None, Some(path)) if !from_stdin => read_token(path),
        _ if ask::is_possible() => ask::secret("Token (not shown): ").await,
        _ => ask::first_line()?.ok_or_else(|| {
            let message = "there is no token on stdin";
            Failure::usage(message, "give it there as one line, or name its file with --token-file")
        }),
    }
}

/// Team of the token, if it has a sandbox that tells. A refused token is a failure.
async fn team(controller: &Controller) -> Result<Option<String>, Failure> {
    let request = ListSandboxesRequest { page_size: 1, include_ended: true, ..Default::default() };
    let call = || {
        let (mut client, request) = (controller.sandboxes.clone(), request.clone());
        async move { client.list_sandboxes(request).await }
    };
    let listed = client::read(call).await?;
    Ok(listed.sandboxes.into_iter().next().map(|sandbox| sandbox.team))
}

/// Host in an endpoint, as a name for its context.
fn host(endpoint: &str) -> String {
    let rest = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    let host = rest.split(['/', ':']).next().unwrap_or_default();
    if host.starts_with('[') { "default".into() } else { host.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_is_named_by_the_host() {
        for (endpoint, name) in [
            ("https://controller.example:7443", "controller.example"),
            ("https://10.0.0.1/", "10.0.0.1"),
            ("https://[::1]:7443", "default"),
        ] {
            assert_eq!(host(endpoint), name);
        }
    }
}
