//! `__complete`: what can come next in an unfinished command line, for the completion scripts. Ends
//! within two seconds, and says nothing when something is wrong.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use clap::{Args, Command};
use tokio::time::timeout;

use crate::{
    client::{self, Controller},
    complete::{self, Point, Values},
    config_file::{self, Context},
    failure::Failure,
    output::{Output, json},
    printable::one_line,
    resolve,
    settings::{Connection, Settings},
};

/// Arguments of `__complete`.
#[derive(Debug, Args)]
pub(crate) struct Complete {
    /// Words after the name of the program; the last one is not finished
    #[arg(last = true)]
    words: Vec<String>,
}

/// Longest wait for the controller.
const WAIT: Duration = Duration::from_secs(2);

/// Value and its description.
type Candidate = (String, String);

pub(super) async fn run(
    mut definition: Command,
    connection: &Connection,
    args: Complete,
    output: Output,
) -> Result<u8, Failure> {
    definition.build();
    let point = complete::at(&definition, &args.words);
    let Ok(Ok(values)) = timeout(WAIT, values(&point, connection)).await else { return Ok(0) };
    let Point { stays, typed, .. } = &point;
    for (value, about) in values.iter().filter(|(value, _)| value.starts_with(typed.as_str())) {
        output.styled(format!("{stays}{}\t{}", one_line(value), one_line(about)))?;
    }
    Ok(0)
}

async fn values(point: &Point, connection: &Connection) -> Result<Vec<Candidate>, Failure> {
    let connect = || Controller::new(&Settings::find(&typed(connection, point))?);
    Ok(match &point.values {
        Values::Words(words) => words.clone(),
        Values::Sandboxes => sandboxes(&connect()?, "").await?,
        // The shell completes what does not name a sandbox.
        Values::Places if point.typed.contains(['/', '.', ':']) => Vec::new(),
        Values::Places => sandboxes(&connect()?, ":").await?,
        Values::Nodes => nodes(&connect()?).await?,
        Values::Snapshots => snapshots(&connect()?).await?,
        Values::Contexts => contexts(&typed(connection, point))?,
        Values::Execs(id) => execs(&connect()?, id).await?,
        Values::Other => Vec::new(),
    })
}

/// Connection with the flags of the unfinished command line.
fn typed(connection: &Connection, point: &Point) -> Connection {
    let flag = |name: &str| point.flags.get(name).cloned();
    let path = |name: &str| flag(name).map(Into::into);
    let named = flag("context").is_some();
    let before = if named { connection.without_environment() } else { connection.clone() };
    Connection {
        endpoint: flag("endpoint").or(before.endpoint),
        token: flag("token").map(Into::into).or(before.token),
        token_file: path("token_file").or(before.token_file),
        ca: path("ca").or(before.ca),
        client_cert: path("client_cert").or(before.client_cert),
        context: flag("context").or(before.context),
        config: path("config").or(before.config),
        ..connection.clone()
    }
}

async fn sandboxes(controller: &Controller, after: &str) -> Result<Vec<Candidate>, Failure> {
    let listed = client::list(controller, false).await?;
    let known = listed.iter().map(|sandbox| {
        let about =
            format!("{} {} {}", json::phase(sandbox.phase()), sandbox.node, sandbox.snapshot_id);
        (format!("{}{after}", sandbox.id), about)
    });
    // A sandbox that moved between two pages is listed twice.
    let known: BTreeMap<_, _> = known.collect();
    let remembered = [("@current", "chosen by `use`"), ("@last", "created last")];
    let remembered = remembered.map(|(name, about)| (format!("{name}{after}"), about.to_owned()));
    Ok(known.into_iter().chain(remembered).collect())
}

async fn snapshots(controller: &Controller) -> Result<Vec<Candidate>, Failure> {
    let known = client::snapshots(controller).await?;
    Ok(known.into_iter().map(|one| (one.id, super::get::size(one.size))).collect())
}

/// Contexts of the configuration, which costs no call.
fn contexts(connection: &Connection) -> Result<Vec<Candidate>, Failure> {
    let known = config_file::read(connection.config.as_deref())?.contexts;
    let about = |context: Context| context.endpoint.unwrap_or_default();
    Ok(known.into_iter().map(|(name, context)| (name, about(context))).collect())
}

/// Nodes that hold a snapshot: every token may ask for these.
async fn nodes(controller: &Controller) -> Result<Vec<Candidate>, Failure> {
    let known = client::snapshots(controller).await?;
    let names: BTreeSet<_> = known.into_iter().flat_map(|snapshot| snapshot.nodes).collect();
    Ok(names.into_iter().map(|name| (name, String::new())).collect())
}

async fn execs(controller: &Controller, id: &str) -> Result<Vec<Candidate>, Failure> {
    let id = resolve::resolve(controller, id).await?;
    let known = super::exec_id::list(controller, &id).await?;
    Ok(known.into_iter().map(|exec| (exec.exec_id, exec.command)).collect())
}
