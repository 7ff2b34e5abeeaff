//! Writes to a journal until it is ended, and prints every write that was answered as durable. For
//! the tests of disk faults: `journal-writer FILE`.

use std::{io::Write as _, net::Ipv4Addr, path::PathBuf, sync::Arc};

use agent::{
    clock::Moment,
    journal::{Intent, Journal, Lifetime, Phase, Pools, Record, SqliteJournal, WakeOn},
};
use anyhow::{Context as _, Result};
use proto::{
    id::{SandboxId, Vmid},
    spec::{Network, Size},
};

/// Number of concurrent callers, so that transactions hold several writes.
const CALLERS: u64 = 8;

#[tokio::main]
async fn main() -> Result<()> {
    let path = PathBuf::from(std::env::args_os().nth(1).context("a journal's file")?);
    let journal = Arc::new(SqliteJournal::open(&path, pools()?)?);
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..CALLERS {
        let journal = Arc::clone(&journal);
        callers.spawn(async move { call(&journal, caller).await });
    }
    while let Some(ended) = callers.join_next().await {
        ended??;
    }
    Ok(())
}

async fn call(journal: &SqliteJournal, caller: u64) -> Result<()> {
    for number in 0.. {
        let id = SandboxId::new(number, &[u8::try_from(caller)?; 10]);
        let intent = Intent {
            record: record(id)?,
            lease_address: false,
            taken: Default::default(),
            taken_ips: Default::default(),
        };
        let mut record = journal.begin(intent, 0).await?;
        tell(&record)?;
        for phase in [Phase::Running, Phase::Deleting, Phase::Deleted] {
            record = journal.update(&Record { phase, ended_ms: 1, ..record }).await?;
            tell(&record)?;
        }
    }
    Ok(())
}

/// Prints a line in one short write: it is complete or missing.
fn tell(record: &Record) -> Result<()> {
    let line = format!("{} {}\n", record.id, record.revision);
    std::io::stdout().lock().write_all(line.as_bytes()).context("nobody listens")
}

fn pools() -> Result<Pools> {
    Ok(Pools {
        vmids: (Vmid::try_from(100_000)?, Vmid::try_from(900_000)?),
        addresses: (Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 0, 9)),
        address_quarantine_ms: 0,
    })
}

fn record(id: SandboxId) -> Result<Record> {
    Ok(Record {
        id,
        vmid: Vmid::try_from(100)?,
        template: Vmid::try_from(9000)?,
        team: "acme".parse()?,
        request_id: format!("r-{id}").parse()?,
        body_digest: "0".repeat(64),
        attempt: 1,
        phase: Phase::Creating,
        progress: proto::Progress::Queued,
        snapshot: "base".parse()?,
        size: Size { cpu_cores: 1, memory_mib: 512, disk_gib: 0 },
        network: Network::Dhcp,
        egress: Default::default(),
        ip: None,
        ip_granted: false,
        further_ips: Vec::new(),
        services: Default::default(),
        access: Default::default(),
        name: None,
        metadata: [("text".to_owned(), "x".repeat(900))].into(),
        env: Default::default(),
        env_lost: false,
        boot: 0,
        created_ms: 0,
        started_ms: 0,
        ended_ms: 0,
        wake_on: WakeOn::default(),
        lifetime: Lifetime::default(),
        since: Moment::default(),
        init: None,
        halt_by: None,
        resizing: None,
        disk_unfinished: false,
        stop_result: proto::sandbox::v1::StopResult::Unspecified,
        cause: proto::Cause::ASKED,
        adopted: false,
        moved_to: None,
        volumes: Default::default(),
        failure: None,
        revision: 0,
    })
}
