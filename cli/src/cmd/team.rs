//! `team`: lists teams, shows what they may have and use, and sets their limits.

use clap::{Args, Subcommand};
use proto::{
    limits::{Limit, Rate},
    sandbox::v1::{self as wire, GetTeamRequest, ListTeamsRequest, Team, UpdateTeamRequest},
    spec::Egress,
};
use serde_json::{Value, json};

use crate::{
    client::{Controller, promised, read},
    failure::Failure,
    listing::{self, Listing},
    output::{
        Output,
        layout::Column,
        table::{self, Cell, Colour, Table},
    },
    sizes,
};

/// Verbs of `team`.
#[derive(Debug, Subcommand)]
pub(crate) enum TeamVerb {
    /// List the teams that have tokens, sandboxes or limits of their own
    #[command(
        visible_alias = "list",
        after_help = "\
Examples:
  sandboxctl team ls                            what each uses, and what it may
  sandboxctl team ls --sort -sandboxes          the one with the most first

A team comes into being with its first token: see
`sandboxctl token create --team`."
    )]
    Ls(Listing),
    /// Show the limits of a team, and what it uses of each
    #[command(after_help = "\
Examples:
  sandboxctl team get                           your own team, with any token
  sandboxctl team get acme                      another one, as an operator")]
    Get {
        /// Name of the team [default: that of your token]
        #[arg(value_name = "TEAM")]
        team_name: Option<String>,
    },
    /// Set limits of a team; those that are not named stay as they are
    Set(Box<Set>),
}

/// Arguments of `team set`.
#[derive(Debug, Args)]
#[command(override_usage = "sandboxctl team set <OPTIONS> <TEAM>")]
#[command(after_help = "\
Examples:
  sandboxctl team set acme --sandboxes 20 --memory 80g --creates 10/hour
  sandboxctl team set acme --cores none     no limit, whatever the controller's
                                            default is
  sandboxctl team set acme --cores default  as the controller's configuration
                                            says
  sandboxctl team set acme --creates 100/30m --user-creates 5/hour
  sandboxctl team set acme --egress none    its new sandboxes reach nothing
                                            outside
  sandboxctl team set acme --execs 600/1m --running-execs 64 --kept-output 512m
  sandboxctl team set acme --changes 60/1m --streams 200 --events 50000
  sandboxctl team set acme --egress 'allow=github.com,*.npmjs.org'
                                            these names at most

A limit counts from the next creation, command or call on; it ends nothing that
is there. 0 lets nothing more in. Of events beyond the limit the oldest are
dropped, within 10 minutes.")]
pub(crate) struct Set {
    /// Name of the team
    #[arg(value_name = "TEAM")]
    team_name: String,
    /// Limits, one at least.
    #[command(flatten)]
    limits: Wishes,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
struct Wishes {
    /// Sandboxes that are not deleted
    #[arg(long, value_name = "N", value_parser = number)]
    sandboxes: Option<Wanted<u64>>,
    /// Cores of all its sandboxes
    #[arg(long, value_name = "N", value_parser = number)]
    cores: Option<Wanted<u64>>,
    /// Memory of all its sandboxes, such as 80g; a bare number is MiB
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    memory: Option<Wanted<u64>>,
    /// Disk of all its sandboxes, such as 2T; a bare number is GiB
    #[arg(long, value_name = "SIZE", value_parser = disk)]
    disk: Option<Wanted<u64>>,
    /// Creations of the team, such as 10/hour or 100/30m
    #[arg(long, value_name = "RATE", value_parser = rate)]
    creates: Option<Wanted<Rate>>,
    /// Creations of each user of the team
    #[arg(long, value_name = "RATE", value_parser = rate)]
    user_creates: Option<Wanted<Rate>>,
    /// Most that its sandboxes may reach outside: open, none, allow=NAME,NAME, or default
    #[arg(long, value_name = "open|none|allow=NAMES", value_parser = most)]
    egress: Option<Most>,
    /// Commands that the team starts, such as 600/1m
    #[arg(long, value_name = "RATE", value_parser = rate)]
    execs: Option<Wanted<Rate>>,
    /// Commands that run at the same time
    #[arg(long, value_name = "N", value_parser = number)]
    running_execs: Option<Wanted<u64>>,
    /// Watches, commands and file transfers that are open at the same time
    #[arg(long, value_name = "N", value_parser = number)]
    streams: Option<Wanted<u64>>,
    /// Output of commands that the nodes keep, such as 512m; a bare number is MiB
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    kept_output: Option<Wanted<u64>>,
    /// Events that are kept
    #[arg(long, value_name = "N", value_parser = number)]
    events: Option<Wanted<u64>>,
    /// Changes of sandboxes that there are (start, stop, pause, resume, resize, expose, ...)
    #[arg(long, value_name = "RATE", value_parser = rate)]
    changes: Option<Wanted<Rate>>,
}

/// Most that a team's sandboxes reach; `None`: as the controller's configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Most(Option<Egress>);

fn most(text: &str) -> Result<Most, String> {
    match text {
        "default" => Ok(Most(None)),
        text => text
            .parse()
            .map(|egress| Most(Some(egress)))
            .map_err(|why: proto::id::Invalid| format!("{why}; or `default`")),
    }
}

/// Limit as it is typed: a value, `none`, or `default`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted<T> {
    /// This limit, or none.
    Own(Limit<T>),
    /// As the controller's configuration says.
    Default,
}

impl<T> Wanted<T> {
    fn own(self) -> Option<Limit<T>> {
        match self {
            Self::Own(limit) => Some(limit),
            Self::Default => None,
        }
    }
}

fn wanted<T>(
    text: &str,
    value: impl FnOnce(&str) -> Result<T, String>,
) -> Result<Wanted<T>, String> {
    match text {
        "none" => Ok(Wanted::Own(Limit::Unlimited)),
        "default" => Ok(Wanted::Default),
        text => value(text)
            .map(|value| Wanted::Own(Limit::Max(value)))
            .map_err(|why| format!("{why}; or `none`, or `default`")),
    }
}

fn number(text: &str) -> Result<Wanted<u64>, String> {
    wanted(text, |text| text.parse().map_err(|_| "must be a whole number".into()))
}

fn memory(text: &str) -> Result<Wanted<u64>, String> {
    wanted(text, |text| sizes::memory(text).map(Into::into))
}

fn disk(text: &str) -> Result<Wanted<u64>, String> {
    wanted(text, |text| sizes::disk(text).map(Into::into))
}

fn rate(text: &str) -> Result<Wanted<Rate>, String> {
    wanted(text, |text| text.parse().map_err(|why: proto::id::Invalid| why.to_string()))
}

const COLUMNS: &[Column] = &[
    Column::new("NAME"),
    Column::new("SANDBOXES").right(),
    Column::new("CORES").rank(1).right(),
    Column::new("MEMORY").rank(2).right(),
    Column::new("DISK").rank(3).right(),
    Column::new("CREATES").rank(4).right(),
];

/// Number of limits that the list of teams has: the first ones, in the order of its columns.
const LISTED: usize = COLUMNS.len() - 1;

const LIMITS: &[Column] = &[
    Column::new("LIMIT"),
    Column::new("USED").right(),
    Column::new("MAX").right(),
    Column::new("FROM").rank(1),
];

pub(super) async fn run(
    controller: Controller,
    verb: TeamVerb,
    output: Output,
) -> Result<u8, Failure> {
    match verb {
        TeamVerb::Ls(listing) => ls(controller, &listing, output).await?,
        TeamVerb::Get { team_name } => {
            let request = GetTeamRequest { name: team_name.unwrap_or_default() };
            let call = || {
                let (mut client, request) = (controller.operator.clone(), request.clone());
                async move { client.get_team(request).await }
            };
            show(&promised(read(call).await?.team)?, output)?;
        }
        TeamVerb::Set(args) => set(controller, *args, output).await?,
    }
    Ok(0)
}

async fn ls(controller: Controller, listing: &Listing, output: Output) -> Result<(), Failure> {
    let (mut request, mut teams) = (ListTeamsRequest::default(), Vec::new());
    loop {
        let call = || {
            let (mut client, request) = (controller.operator.clone(), request.clone());
            async move { client.list_teams(request).await }
        };
        let page = read(call).await?;
        teams.extend(page.teams);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let mut table = Table::new(COLUMNS);
    for team in &teams {
        let limits = limits(team);
        let mut row = vec![table::cell(&team.name)];
        row.extend(limits.iter().take(LISTED).map(Row::of_list));
        table.row(row);
    }
    let values: Vec<_> = teams.iter().map(value).collect();
    listing.print(output, table, &values, "no teams; `sandboxctl token create --team` makes one")
}

async fn set(
    controller: Controller,
    Set { team_name, limits: args }: Set,
    output: Output,
) -> Result<(), Failure> {
    let named = [
        ("limits.sandboxes", args.sandboxes.is_some()),
        ("limits.cpu_cores", args.cores.is_some()),
        ("limits.memory_mib", args.memory.is_some()),
        ("limits.disk_gib", args.disk.is_some()),
        ("limits.creates", args.creates.is_some()),
        ("limits.user_creates", args.user_creates.is_some()),
        ("limits.egress", args.egress.is_some()),
        ("limits.execs", args.execs.is_some()),
        ("limits.running_execs", args.running_execs.is_some()),
        ("limits.streams", args.streams.is_some()),
        ("limits.output_mib", args.kept_output.is_some()),
        ("limits.events", args.events.is_some()),
        ("limits.changes", args.changes.is_some()),
    ];
    let limits = proto::limits::TeamLimits {
        sandboxes: args.sandboxes.and_then(Wanted::own),
        cpu_cores: args.cores.and_then(Wanted::own),
        memory_mib: args.memory.and_then(Wanted::own),
        disk_gib: args.disk.and_then(Wanted::own),
        creates: args.creates.and_then(Wanted::own),
        user_creates: args.user_creates.and_then(Wanted::own),
        egress: args.egress.and_then(|Most(egress)| egress),
        execs: args.execs.and_then(Wanted::own),
        running_execs: args.running_execs.and_then(Wanted::own),
        streams: args.streams.and_then(Wanted::own),
        output_mib: args.kept_output.and_then(Wanted::own),
        events: args.events.and_then(Wanted::own),
        changes: args.changes.and_then(Wanted::own),
    };
    let team = Team { name: team_name, limits: Some(limits.into()), ..Team::default() };
    let paths = named.iter().filter(|(_, set)| *set).map(|(path, _)| (*path).to_owned()).collect();
    let update_mask = Some(prost_types::FieldMask { paths });
    let request = UpdateTeamRequest { team: Some(team), update_mask };
    let call = || {
        let (mut client, request) = (controller.operator.clone(), request.clone());
        async move { client.update_team(request).await }
    };
    show(&promised(read(call).await?.team)?, output)
}

fn show(team: &Team, output: Output) -> Result<(), Failure> {
    if output.json {
        return output.value(&value(team));
    }
    output.line(format!("team {}", team.name))?;
    let mut table = Table::new(LIMITS);
    for limit in limits(team) {
        let from = if limit.own { "its own" } else { "the default" };
        let used = limit.used.map_or_else(String::new, |used| limit.text(used));
        table.row(vec![
            table::cell(limit.heading),
            table::cell(used),
            table::cell(limit.max_text()),
            table::cell(from),
        ]);
    }
    let (most, own) = egress(team);
    let from = if own { "its own" } else { "the default" };
    table.row(vec![table::cell("egress"), table::cell(""), table::cell(most), table::cell(from)]);
    listing::table(output, table)
}

/// Most that the sandboxes of a team reach, as it is typed, and whether the team has it of its own.
fn egress(team: &Team) -> (String, bool) {
    let own = team.limits.as_ref().is_some_and(|own| own.egress() != wire::Egress::Unspecified);
    let most = team.effective.as_ref().map(|all| {
        // What a later controller says is something tighter than open.
        Egress::read(all.egress, &all.egress_names, "egress").unwrap_or(Some(Egress::None))
    });
    (most.flatten().unwrap_or_default().to_string(), own)
}

/// One limit of a team.
struct Row {
    /// Name in the API.
    name: &'static str,
    heading: &'static str,
    /// Use at the moment; `None` where that is told for no team as a whole.
    used: Option<u64>,
    max: Option<u64>,
    /// Window of a rate, as it is written.
    rate: Option<String>,
    /// Whether the team has it of its own.
    own: bool,
}

impl Row {
    fn text(&self, number: u64) -> String {
        match self.name {
            "memory_mib" | "output_mib" => table::bytes(number << 20),
            "disk_gib" => format!("{number} GiB"),
            _ => number.to_string(),
        }
    }

    fn max_text(&self) -> String {
        match (&self.rate, self.max) {
            (Some(rate), _) => rate.clone(),
            (None, Some(max)) => self.text(max),
            (None, None) => "none".into(),
        }
    }

    fn of_list(&self) -> Cell {
        let used = self.used.unwrap_or_default();
        let text = match self.max {
            Some(_) => format!("{} of {}", self.text(used), self.max_text()),
            None => self.text(used),
        };
        let cell = table::cell(text).short(self.text(used)).number(used as f64);
        if self.max.is_some_and(|max| used >= max) { cell.colour(Colour::Yellow) } else { cell }
    }
}

fn sum(
    (name, heading): (&'static str, &'static str),
    used: u64,
    limit: Option<wire::Limit>,
    own: Option<wire::Limit>,
) -> Row {
    let max = limit.filter(|limit| !limit.unlimited).map(|limit| limit.max);
    Row { name, heading, used: Some(used), max, rate: None, own: own.is_some() }
}

fn rated(
    (name, heading): (&'static str, &'static str),
    used: Option<u32>,
    limit: Option<wire::RateLimit>,
    own: Option<wire::RateLimit>,
) -> Row {
    let limit = limit.filter(|limit| !limit.unlimited);
    let window = |limit: &wire::RateLimit| limit.window.and_then(proto::duration::read);
    let written = limit.map(|limit| {
        let window = window(&limit).unwrap_or_default();
        Rate { count: limit.count, window }.to_string()
    });
    let (used, max) = (used.map(Into::into), limit.map(|limit| limit.count.into()));
    Row { name, heading, used, max, rate: written, own: own.is_some() }
}

/// Limits of a team, those of the list first.
fn limits(team: &Team) -> [Row; 12] {
    let of = |limits: &Option<wire::TeamLimits>| limits.clone().unwrap_or_default();
    let (own, all) = (of(&team.limits), of(&team.effective));
    let used = team.usage.unwrap_or_default();
    let (creates, execs, changes) = (Some(used.creates), Some(used.execs), Some(used.changes));
    [
        sum(("sandboxes", "sandboxes"), used.sandboxes, all.sandboxes, own.sandboxes),
        sum(("cpu_cores", "cores"), used.cpu_cores, all.cpu_cores, own.cpu_cores),
        sum(("memory_mib", "memory"), used.memory_mib, all.memory_mib, own.memory_mib),
        sum(("disk_gib", "disk"), used.disk_gib, all.disk_gib, own.disk_gib),
        rated(("creates", "creates"), creates, all.creates, own.creates),
        rated(("user_creates", "creates of a user"), None, all.user_creates, own.user_creates),
        rated(("changes", "changes"), changes, all.changes, own.changes),
        rated(("execs", "commands started"), execs, all.execs, own.execs),
        sum(
            ("running_execs", "commands running"),
            used.running_execs,
            all.running_execs,
            own.running_execs,
        ),
        sum(("output_mib", "kept output"), used.output_mib, all.output_mib, own.output_mib),
        sum(("streams", "streams"), used.streams, all.streams, own.streams),
        sum(("events", "kept events"), used.events, all.events, own.events),
    ]
}

/// JSON of a team.
fn value(team: &Team) -> Value {
    let mut used = serde_json::Map::new();
    let mut max = serde_json::Map::new();
    let mut own = Vec::new();
    for row in limits(team) {
        if let Some(number) = row.used {
            used.insert(row.name.into(), number.into());
        }
        let most = row.rate.map(Value::from).or(row.max.map(Value::from));
        max.insert(row.name.into(), most.unwrap_or(Value::Null));
        if row.own {
            own.push(row.name);
        }
    }
    let (most, has_own) = egress(team);
    max.insert("egress".into(), most.into());
    if has_own {
        own.push("egress");
    }
    json!({ "id": team.name, "used": used, "max": max, "own": own })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn limits_are_typed_as_values_none_or_default() {
        assert_eq!(number("20"), Ok(Wanted::Own(Limit::Max(20))));
        assert_eq!(memory("80g"), Ok(Wanted::Own(Limit::Max(81_920))));
        assert_eq!(disk("2T"), Ok(Wanted::Own(Limit::Max(2048))));
        assert_eq!(number("none"), Ok(Wanted::Own(Limit::Unlimited)));
        assert_eq!(rate("default"), Ok(Wanted::Default));
        let hour = Rate { count: 10, window: Duration::from_hours(1) };
        assert_eq!(rate("10/hour"), Ok(Wanted::Own(Limit::Max(hour))));
        for wrong in ["", "-1", "x", "10"] {
            assert!(rate(wrong).is_err_and(|why| why.contains("`default`")), "{wrong}");
        }
    }
}
