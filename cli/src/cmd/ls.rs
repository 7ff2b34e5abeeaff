//! `ls`: lists the team's sandboxes. The API chooses them where it can.

use clap::Args;
use proto::sandbox::v1::{ListSandboxesRequest, Sandbox, SandboxFilter, SandboxOrder};

use super::filter::{self, Condition};
use crate::{
    client::{self, Controller},
    failure::Failure,
    listing::Listing,
    output::{
        Output, json,
        layout::{Column, Fit},
        short::Part,
        table::{self, Table},
        time,
    },
};

/// Arguments of `ls`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl ls          as many columns as fit; short ids
  sandboxctl ls -o wide  all columns, with whole values
  sandboxctl ls --filter phase=stopped --filter meta.user=ada
  sandboxctl ls --filter phase=stopped -q | xargs sandboxctl rm
  sandboxctl ls --sort -age --columns id,age,metadata
  sandboxctl ls --watch  drawn again as it changes; in a pipe, a line a change

Several --filter of one key are alternatives, those of different keys must all
be true. Keys: phase, node, snapshot, name and id (their beginnings), meta.NAME.")]
pub(crate) struct Ls {
    /// Also those that are deleted or whose creation failed
    #[arg(short, long)]
    all: bool,
    /// Print the ids only, one a line; as -o name
    #[arg(short, long)]
    quiet: bool,
    /// Only those with this value; may be given often
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub(super) filter: Vec<Condition>,
    /// Go on and show what changes, until Ctrl-C
    #[arg(short, long)]
    pub(super) watch: bool,
    /// Flags of the list.
    #[command(flatten)]
    pub(super) listing: Listing,
}

const COLUMNS: &[Column] = &[
    Column::new("ID").ids(Part::End),
    Column::new("NAME").rank(1).fit(Fit::Cut(8)),
    Column::new("VMID").rank(4).right(),
    Column::new("NODE").rank(2).fit(Fit::Cut(8)),
    Column::new("PHASE").fit(Fit::Step(11)),
    Column::new("IP").rank(3),
    Column::new("SNAPSHOT").rank(6).fit(Fit::Cut(12)),
    Column::new("SIZE").rank(7).fit(Fit::Step(16)),
    Column::new("PORTS").rank(5).fit(Fit::Cut(5)),
    Column::new("AGE").rank(1).right(),
    Column::new("EXPIRES").extra(),
    Column::new("METADATA").extra(),
];

const EMPTY: &str = "no sandboxes; `sandboxctl create` makes one";

pub(super) async fn run(controller: Controller, ls: Ls, output: Output) -> Result<u8, Failure> {
    let output = ls.form(output);
    let mut sandboxes = client::list_all(&controller, ls.request()).await?;
    sandboxes.retain(|sandbox| filter::matches(&ls.filter, sandbox));
    let values: Vec<_> = sandboxes.iter().map(json::sandbox).collect();
    let empty = if ls.filter.is_empty() { EMPTY } else { "no sandbox is like this" };
    ls.listing.print(output, table(&sandboxes), &values, empty)?;
    Ok(0)
}

impl Ls {
    /// Form of the output, with -q in it.
    pub(super) fn form(&self, output: Output) -> Output {
        Output { names: output.names || self.quiet, ..output }
    }

    /// Request for these sandboxes, as far as the API can choose them. The rest is ours.
    fn request(&self) -> ListSandboxesRequest {
        let newest = self.listing.sort.as_deref() == Some("age");
        let order = if newest { SandboxOrder::NewestFirst } else { SandboxOrder::Unspecified };
        ListSandboxesRequest {
            include_ended: self.all,
            filter: Some(filter::of_api(&self.filter)),
            order: order.into(),
            ..Default::default()
        }
    }

    /// Conditions for a watch. It has ended sandboxes only where their phases are asked for.
    pub(super) fn watched(&self) -> SandboxFilter {
        let mut filter = filter::of_api(&self.filter);
        if self.all && filter.phases.is_empty() {
            filter.phases = filter::all_phases();
        }
        filter
    }
}

/// Prints one sandbox as a line of its own.
pub(super) fn line(sandbox: &Sandbox, ls: &Ls, output: Output) -> Result<(), Failure> {
    if output.json {
        return output.value(&json::sandbox(sandbox));
    }
    if output.names {
        return output.line(&sandbox.id);
    }
    let mut view = ls.listing.shown.view(output);
    view.bare = true;
    output.styled(table(std::slice::from_ref(sandbox)).lines(&view)?.join("\n"))
}

/// Table of sandboxes.
pub(super) fn table(sandboxes: &[Sandbox]) -> Table {
    let mut table = Table::new(COLUMNS);
    sandboxes.iter().for_each(|sandbox| table.row(row(sandbox)));
    table
}

fn row(sandbox: &Sandbox) -> Vec<table::Cell> {
    let ports: Vec<_> = sandbox.services.iter().map(|service| service.port.to_string()).collect();
    let pairs: Vec<_> =
        sandbox.metadata.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let size = sandbox.size.unwrap_or_default();
    vec![
        table::cell(&sandbox.id),
        table::cell(&sandbox.name),
        table::vmid(sandbox.vmid),
        table::cell(&sandbox.node),
        table::phase(sandbox.phase(), sandbox.progress().name()),
        table::cell(&sandbox.ip),
        table::cell(&sandbox.snapshot_id),
        table::cell(super::get::size(sandbox.size))
            .short(super::get::cores_and_memory(size))
            .number(f64::from(size.cpu_cores) * 1e9 + f64::from(size.memory_mib)),
        table::cell(ports.join(",")),
        table::age(sandbox.created_at),
        table::cell(time::rfc3339(sandbox.expires_at).unwrap_or_default()),
        table::cell(pairs.join(",")),
    ]
}

#[cfg(test)]
pub(super) mod tests {
    use proto::{
        Progress,
        sandbox::v1::{HttpService, Phase, Size},
    };

    use super::*;

    /// Table of sandboxes with long values, for the screens.
    pub(in crate::cmd) fn screen() -> Table {
        let one = |id: &str, phase: Phase, progress: Progress| Sandbox {
            id: id.into(),
            vmid: 100_017,
            node: "pve-frankfurt-rack-12".into(),
            phase: phase.into(),
            progress: progress.into(),
            ip: "10.100.200.117".into(),
            snapshot_id: "pvelxc_4vcpu_6gb_32gb_v1".into(),
            size: Some(Size { cpu_cores: 16, memory_mib: 6144, disk_gib: 32 }),
            services: [3000, 8000, 8080, 5173]
                .map(|port| HttpService { port, ..HttpService::default() })
                .into(),
            metadata: [("user".to_owned(), "ada.lovelace@example.com".to_owned())].into(),
            ..Sandbox::default()
        };
        table(&[
            one("pvelxc-06g1t7q8hk0fjf1k8m2v3n4p5q", Phase::Running, Progress::Done),
            one("pvelxc-06g1t7q8hk0fjf1k8m2v3n4p6q", Phase::Creating, Progress::ResizeOffline),
            one("pvelxc-06g1t7q8hk0fjf1k8m2w3n4p5q", Phase::Unreachable, Progress::Done),
        ])
    }
}
