//! `stop`: stops sandboxes.

use std::time::Duration;

use clap::Args;
use proto::sandbox::v1::{Phase, StopSandboxRequest};

use super::lifecycle::{Change, change, settled};
use crate::{
    client::{Controller, Sandboxes},
    failure::Failure,
    output::Output,
    values::duration_or_zero,
};

/// Arguments of `stop`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl stop ID             its services get 10 s to end, then it is killed
  sandboxctl stop --grace 2m ID  a database that takes its time
  sandboxctl stop --grace 0 ID   kill it at once
")]
pub(crate) struct Stop {
    /// Sandboxes to stop.
    #[command(flatten)]
    pub(super) asked: Change,
    /// Time to shut down by itself before it is killed, up to 10m [default: its node's, 10s]
    #[arg(long, short = 't', visible_alias = "time", value_name = "TIME", value_parser = duration_or_zero)]
    grace: Option<Duration>,
}

pub(super) async fn run(controller: Controller, stop: Stop, output: Output) -> Result<u8, Failure> {
    let grace = stop.grace.map(|grace| prost_types::Duration {
        seconds: i64::try_from(grace.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(grace.subsec_nanos()).unwrap_or_default(),
    });
    let call = move |mut client: Sandboxes, id| async move {
        let request = StopSandboxRequest { id, grace };
        Ok(client.stop_sandbox(request).await?.map(|told| told.sandbox))
    };
    change(controller, stop.asked, output, call, |now| settled(now, Phase::Stopped)).await
}
