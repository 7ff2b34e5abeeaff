//! `token`: makes, lists and revokes the tokens of teams.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, builder::PossibleValuesParser};
use proto::{
    sandbox::v1::{CreateTokenRequest, ListTokensRequest, RevokeTokenRequest, Scope, Token},
    scope::Scopes,
    token::{self as text, Format},
};
use serde_json::{Value, json};

use super::{
    client_key,
    validity::{self, Terms, Validity},
};
use crate::{
    client::{Controller, answer, promised, read},
    failure::Failure,
    listing::Listing,
    output::{
        Output,
        layout::{Column, Fit},
        table::{self, Table},
    },
};

/// Verbs of `token`.
#[derive(Debug, Subcommand)]
pub(crate) enum TokenVerb {
    /// Make a token and print it; it is shown this once only
    Create(Create),
    /// List tokens, without their secrets
    #[command(visible_alias = "list")]
    Ls(Ls),
    /// Make a token useless, at once
    Revoke(Revoke),
}

/// Arguments of `token create`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl token create ci --scope exec,manage --expires 90d
  sandboxctl token create --team acme --user ada@example.com > token
  sandboxctl token create --format e2b        for libraries that want `e2b_...`
  sandboxctl token create ci --certificate ci.pem
                                              a certificate and its key

Scopes: `read` looks, and is in every other one; `exec` runs commands and works
on files; `manage` creates, changes and deletes sandboxes; `admin` is for
operators: nodes, tokens, teams.
The token goes to stdout, all else to stderr. A certificate takes the place of
the token: `sandboxctl --client-cert ci.pem ls`, or `sandboxctl login`.")]
pub(crate) struct Create {
    /// Name of the token, unique among the team's living ones [default: its id]
    #[arg(value_name = "NAME")]
    token_name: Option<String>,
    /// Team whose sandboxes it is for [default: that of your own token]
    #[arg(long)]
    team: Option<String>,
    /// Scopes, such as read or exec,manage [default: read,exec,manage]
    #[arg(long = "scope", value_name = "SCOPES", value_delimiter = ',', value_parser = scopes())]
    scopes: Vec<String>,
    /// For whom it is, and for how long.
    #[command(flatten)]
    terms: Terms,
    /// Make a client certificate, and write it with its key to this new file, PEM
    #[arg(long, value_name = "FILE", conflicts_with = "format")]
    certificate: Option<PathBuf>,
    /// Form in which it is printed
    #[arg(long, value_name = "FORM", default_value = Format::Plain.name(), value_parser = formats())]
    format: String,
}

fn scopes() -> PossibleValuesParser {
    PossibleValuesParser::new(Scope::ALL.map(Scope::name))
}

fn formats() -> PossibleValuesParser {
    PossibleValuesParser::new(Format::ALL.map(Format::name))
}

/// Arguments of `token ls`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl token ls                 the living tokens of all teams
  sandboxctl token ls --team acme -a  also those that are revoked or expired
  sandboxctl token ls --sort used     the one that was used last comes first")]
pub(crate) struct Ls {
    /// Tokens of this team only
    #[arg(long)]
    team: Option<String>,
    /// Also tokens that are revoked or expired
    #[arg(short, long)]
    all: bool,
    /// Flags of the list.
    #[command(flatten)]
    listing: Listing,
}

/// Arguments of `token revoke`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl token revoke 3f9c0a1b2c3d          by its id, of any team
  sandboxctl token revoke ci --team acme        by its name

It is refused from now on, and its calls and streams that run end. Commands run
on.")]
pub(crate) struct Revoke {
    /// Id or name of the token
    #[arg(value_name = "TOKEN")]
    named: String,
    /// Team in which a name is looked up [default: that of your own token]
    #[arg(long)]
    team: Option<String>,
}

const COLUMNS: &[Column] = &[
    Column::new("ID"),
    Column::new("NAME").fit(Fit::Cut(12)),
    Column::new("TEAM").fit(Fit::Cut(8)),
    Column::new("USER").rank(3).fit(Fit::Cut(10)),
    Column::new("SCOPES").rank(2).fit(Fit::Cut(11)),
    validity::STATE,
    validity::CREATED,
    validity::EXPIRES.rank(4),
    validity::USED,
];

pub(super) async fn run(
    controller: Controller,
    verb: TokenVerb,
    output: Output,
) -> Result<u8, Failure> {
    match verb {
        TokenVerb::Create(args) => create(controller, args, output).await,
        TokenVerb::Ls(args) => ls(controller, args, output).await,
        TokenVerb::Revoke(args) => revoke(controller, args, output).await,
    }
}

async fn create(controller: Controller, args: Create, output: Output) -> Result<u8, Failure> {
    let named = |name: &String| Scope::ALL.into_iter().find(|scope| scope.name() == name);
    let key = args.certificate.as_deref().map(client_key::make).transpose()?;
    let (user, ttl) = args.terms.into_request();
    let request = CreateTokenRequest {
        csr: key.as_ref().map(|key| key.request.clone()).unwrap_or_default(),
        team: args.team.unwrap_or_default(),
        name: args.token_name.unwrap_or_default(),
        user,
        scopes: args.scopes.iter().filter_map(named).map(Into::into).collect(),
        ttl,
    };
    // Not repeated by itself: each call makes a token.
    let made = answer(controller.operator.clone().create_token(request)).await?;
    let (token, plain) = (promised(made.token)?, made.text);
    if let Some(key) = key {
        return certified(&token, &key.save(&token.id, &made.certificate)?, output);
    }
    let format = Format::named(&args.format).unwrap_or_default();
    let shown = text::split(&plain).map(|(id, secret)| format.text(id, secret));
    let shown = promised(shown)?;
    if output.json {
        let mut value = value(&token);
        value["token"] = shown.into();
        output.value(&value)?;
        return Ok(0);
    }
    let Token { id, name, team, .. } = &token;
    output.line(shown)?;
    let scopes = granted(&token);
    output
        .note(format!("token {name} ({id}) of team {team}: {scopes}; it is shown this once only"));
    Ok(0)
}

/// Tells of a client certificate.
fn certified(token: &Token, file: &Path, output: Output) -> Result<u8, Failure> {
    if output.json {
        let mut value = value(token);
        value["file"] = file.to_string_lossy().into();
        output.value(&value)?;
        return Ok(0);
    }
    let Token { id, name, team, .. } = token;
    let scopes = granted(token);
    output.line(format!("wrote {}", file.display()))?;
    output.note(format!(
        "token {name} ({id}) of team {team}: {scopes}; the key is in this file only"
    ));
    Ok(0)
}

async fn ls(controller: Controller, args: Ls, output: Output) -> Result<u8, Failure> {
    let mut request = ListTokensRequest {
        team: args.team.unwrap_or_default(),
        include_ended: args.all,
        ..ListTokensRequest::default()
    };
    let mut tokens = Vec::new();
    loop {
        let call = || {
            let (mut client, request) = (controller.operator.clone(), request.clone());
            async move { client.list_tokens(request).await }
        };
        let page = read(call).await?;
        tokens.extend(page.tokens);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let values: Vec<_> = tokens.iter().map(value).collect();
    let empty = "no tokens; `sandboxctl token create` makes one";
    args.listing.print(output, table(&tokens), &values, empty)?;
    Ok(0)
}

async fn revoke(
    controller: Controller,
    Revoke { named, team }: Revoke,
    output: Output,
) -> Result<u8, Failure> {
    let request = RevokeTokenRequest { token: named, team: team.unwrap_or_default() };
    let call = || {
        let (mut client, request) = (controller.operator.clone(), request.clone());
        async move { client.revoke_token(request).await }
    };
    let token = promised(read(call).await?.token)?;
    if output.json {
        output.value(&value(&token))?;
    } else {
        output.line(format!("{} ({}) of team {} is revoked", token.name, token.id, token.team))?;
    }
    Ok(0)
}

/// Scopes as people read them: those that a scope includes are left out.
fn granted(token: &Token) -> String {
    let scopes: Scopes = token.scopes().collect();
    match scopes.iter().filter(|scope| *scope != Scope::Read).map(Scope::name).collect::<Vec<_>>() {
        others if others.is_empty() => scopes.to_string(),
        others => others.join(" "),
    }
}

fn validity(token: &Token) -> Validity {
    Validity {
        created: token.created_at,
        expires: token.expires_at,
        used: token.used_at,
        ended: token.revoked_at,
        end: "revoked",
    }
}

fn table(tokens: &[Token]) -> Table {
    let mut table = Table::new(COLUMNS);
    for token in tokens {
        let mut row = vec![
            table::cell(&token.id),
            table::cell(&token.name),
            table::cell(&token.team),
            table::cell(&token.user),
            table::cell(granted(token)),
        ];
        row.extend(validity(token).cells());
        table.row(row);
    }
    table
}

/// JSON of a token.
fn value(token: &Token) -> Value {
    let scopes: Scopes = token.scopes().collect();
    let mut value = json!({
        "id": token.id,
        "name": token.name,
        "team": token.team,
        "user": token.user,
        "certificate": token.certificate,
        "ssh_key": token.ssh_key,
        "scopes": scopes.iter().map(Scope::name).collect::<Vec<_>>(),
    });
    validity(token).add_to(&mut value);
    value
}
