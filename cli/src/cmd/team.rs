//! `team`: lists the teams.

use clap::Subcommand;
use proto::sandbox::v1::{ListTeamsRequest, Team};
use serde_json::{Value, json};

use crate::{
    client::{Controller, read},
    failure::Failure,
    listing::Listing,
    output::{
        Output,
        layout::Column,
        table::{self, Table},
    },
};

/// Verbs of `team`.
#[derive(Debug, Subcommand)]
pub(crate) enum TeamVerb {
    /// List the teams that have tokens or sandboxes
    #[command(
        visible_alias = "list",
        after_help = "\
Examples:
  sandboxctl team ls
  sandboxctl team ls -o name

A team comes into being with its first token: see `sandboxctl token create --team`."
    )]
    Ls(Listing),
}

const COLUMNS: &[Column] = &[Column::new("NAME")];

pub(super) async fn run(
    controller: Controller,
    verb: TeamVerb,
    output: Output,
) -> Result<u8, Failure> {
    let TeamVerb::Ls(listing) = verb;
    let teams = list(&controller).await?;
    let mut table = Table::new(COLUMNS);
    teams.iter().for_each(|team| table.row(vec![table::cell(&team.name)]));
    let values: Vec<_> = teams.iter().map(value).collect();
    listing.print(
        output,
        table,
        &values,
        "no teams; `sandboxctl token create --team` makes one",
    )?;
    Ok(0)
}

/// Reads all pages of the list of teams.
async fn list(controller: &Controller) -> Result<Vec<Team>, Failure> {
    let (mut request, mut teams) = (ListTeamsRequest::default(), Vec::new());
    loop {
        let call = || {
            let (mut client, request) = (controller.operator.clone(), request.clone());
            async move { client.list_teams(request).await }
        };
        let page = read(call).await?;
        teams.extend(page.teams);
        if page.next_page_token.is_empty() {
            return Ok(teams);
        }
        request.page_token = page.next_page_token;
    }
}

/// JSON of a team.
fn value(team: &Team) -> Value {
    json!({ "id": team.name })
}
