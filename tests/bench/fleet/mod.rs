//! One controller and a fleet. The shipped program runs as its own process, over its store on a
//! disk; the agents of all nodes, over mutual TLS on TCP, and the callers are in this process.
//! Needs no lab. All share the machine, so the controller has less of it than it would have alone.
//!
//! PVE_SANDBOX_FLEET_NODES and PVE_SANDBOX_FLEET_SANDBOXES make it smaller, for a quick run.

mod caller;
mod controller;
mod nodes;

use std::{
    collections::BTreeMap,
    fs,
    io::{Seek as _, SeekFrom, Write as _},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use proto::sandbox::v1::{Phase, SandboxFilter};
use tokio::{sync::OnceCell, task::JoinSet, time::sleep};

use self::{
    caller::{Caller, session},
    controller::Process,
    nodes::Fleet,
};
use crate::{
    figures::{Figures, median},
    placement::number,
    world::timed,
};

const NODES: u64 = 1_000;
const SANDBOXES: u64 = 100_000;
/// Divisor of the part that is also measured separately: the last tenth, when all is full.
const LAST: usize = 10;
/// Concurrent callers, over `CONNECTIONS` connections.
const CALLERS: usize = 512;
const CONNECTIONS: usize = 8;
/// Number of writes; their median is the time of the disk.
const SYNCS: usize = 200;
const BLOCK: [u8; 4096] = [7; 4096];
/// Quiet time before memory is read, so that delayed writes are finished.
const QUIET: Duration = Duration::from_secs(5);
/// Number of pages that are timed for each size.
const PAGES: usize = 300;
/// Page sizes: the default, as 0, and the largest.
const PAGE_SIZES: [(u32, &str); 2] = [(0, "list_page_ms"), (1000, "list_page_1000_ms")];

const CREATES_PER_SECOND_AIM: f64 = 2_400.0;
const BYTES_PER_SANDBOX_AIM: f64 = 1_024.0;
/// CPU time of `sandboxctl get`.
const CLI_GET_CPU_MS_AIM: f64 = 10.0;
/// Number of these calls: the kernel counts in steps of 10 ms.
const GETS: u32 = 50;

pub(crate) async fn measure(figures: &mut Figures) -> Result<()> {
    let nodes = usize::try_from(number("PVE_SANDBOX_FLEET_NODES")?.unwrap_or(NODES))?;
    let sandboxes = usize::try_from(number("PVE_SANDBOX_FLEET_SANDBOXES")?.unwrap_or(SANDBOXES))?;
    // Beside the program, which is on a disk: /tmp may be in memory.
    let here = std::env::current_exe()?;
    let here = here.parent().context("a program in a directory")?.join("../bench");
    fs::create_dir_all(&here)?;
    let dir = tempfile::Builder::new().prefix("fleet-").tempdir_in(here.canonicalize()?)?;
    figures.alone("disk_fsync_ms", sync_ms(dir.path())?, "ms");

    eprintln!("{nodes} agents and a controller");
    let fleet = Fleet::start(dir.path(), nodes).await?;
    let mut process = Process::start(dir.path(), &fleet.addresses)?;
    let callers = process.callers(CONNECTIONS)?;
    process.until_up(&callers[0], nodes, None).await?;
    sleep(QUIET).await;
    let before = process.rss_bytes()?;

    eprintln!("{sandboxes} creations by {CALLERS} callers");
    let filled = fill(&callers, sandboxes).await?;
    println!(
        "{} cores for the controller, {nodes} agents and {CALLERS} callers; the controller took \
         {:.0} s of them, the rest {:.0} s",
        std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        process.cpu_s()?,
        controller::cpu_s(std::process::id())?,
    );
    aim(figures, "creates_per_second", filled.rate, "creates/s", CREATES_PER_SECOND_AIM, true);
    aim(figures, "creates_per_second_last", filled.last, "creates/s", CREATES_PER_SECOND_AIM, true);

    // The speed of a disk may change from one minute to the next.
    figures.alone("disk_fsync_after_ms", sync_ms(dir.path())?, "ms");
    sleep(QUIET).await;
    let after = process.rss_bytes()?;
    figures.alone("controller_rss_empty", before / 1024.0 / 1024.0, "MiB");
    figures.alone("controller_rss_full", after / 1024.0 / 1024.0, "MiB");
    let each = (after - before) / as_f64(sandboxes);
    aim(figures, "controller_bytes_per_sandbox", each, "bytes", BYTES_PER_SANDBOX_AIM, false);

    lists(figures, &callers[0], sandboxes).await?;

    let cpu = process.get_cpu_ms(&filled.known, GETS)?;
    aim(figures, "cli_get_cpu_ms", cpu, "ms", CLI_GET_CPU_MS_AIM, false);

    eprintln!("the controller is killed and comes back");
    process.kill()?;
    let begun = Instant::now();
    process.again()?;
    process.until_up(&callers[0], nodes, Some(&filled.known)).await?;
    figures.alone("controller_restart_ms", begun.elapsed().as_secs_f64() * 1000.0, "ms");
    sleep(QUIET).await;
    figures.alone("controller_rss_restarted", process.rss_bytes()? / 1024.0 / 1024.0, "MiB");
    let listed = all_pages(&callers[0]).await?;
    ensure!(listed == sandboxes, "{listed} sandboxes of {sandboxes} are listed after the restart");
    ensure!(fleet.made() == sandboxes, "{} creations reached the nodes", fleet.made());
    Ok(())
}

/// Adds a figure beside its aim, and says whether the aim was met.
fn aim(figures: &mut Figures, name: &str, value: f64, unit: &str, aim: f64, at_least: bool) {
    let met = if at_least { value >= aim } else { value <= aim };
    figures.add(name, value, unit, if met { "the aim, met" } else { "the aim, MISSED" }, aim);
}

/// Measures how long the disk takes to persist a block.
fn sync_ms(dir: &Path) -> Result<f64> {
    let mut file = fs::File::create(dir.join("sync"))?;
    let mut times = Vec::new();
    for _ in 0..SYNCS {
        // In place, as a preallocated log is written.
        file.seek(SeekFrom::Start(0))?;
        let begun = Instant::now();
        file.write_all(&BLOCK)?;
        file.sync_data()?;
        times.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    Ok(median(&mut times))
}

/// Result of the fill.
struct Filled {
    /// Creations per second, over all.
    rate: f64,
    /// Creations per second, over the last part.
    last: f64,
    /// Id of one of the sandboxes.
    known: String,
}

/// Creates `sandboxes` sandboxes, each until it runs.
async fn fill(callers: &[Caller], sandboxes: usize) -> Result<Filled> {
    let (next, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let last = sandboxes / LAST;
    let (begun, late) = (Instant::now(), Arc::new(OnceCell::new()));
    let mut tasks = JoinSet::new();
    for number in 0..CALLERS {
        let caller = callers[number % callers.len()].clone();
        let (next, done, late) = (next.clone(), done.clone(), late.clone());
        tasks.spawn(async move {
            let mut known = None;
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= sandboxes {
                    return Ok::<_, anyhow::Error>(known);
                }
                known = Some(caller.create(number).await?);
                let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                if done == sandboxes - last {
                    late.set(Instant::now()).context("once")?;
                }
                if done.is_multiple_of(10_000) {
                    eprintln!("{done} after {:.1} s", begun.elapsed().as_secs_f64());
                }
            }
        });
    }
    let mut known = None;
    while let Some(ended) = tasks.join_next().await {
        known = ended??.or(known);
    }
    let end = Instant::now();
    let late = *late.get().context("the last of the fill began")?;
    Ok(Filled {
        rate: as_f64(sandboxes) / (end - begun).as_secs_f64(),
        last: as_f64(last) / (end - late).as_secs_f64(),
        known: known.context("a sandbox")?,
    })
}

/// Measures pages of the list of all sandboxes, without a filter and with one.
async fn lists(figures: &mut Figures, caller: &Caller, sandboxes: usize) -> Result<()> {
    let mut largest = 0.0;
    for (size, name) in PAGE_SIZES {
        let mut times = pages(caller, size, None, sandboxes).await?;
        largest = median(&mut times);
        figures.alone(name, largest, "ms");
        figures.alone(&format!("{name}_p99"), times[times.len() * 99 / 100], "ms");
    }
    let unfiltered = "the page of 1000 without a filter";
    // All fulfil this one: the pages are the same, and each sandbox on them is checked.
    let running = SandboxFilter { phases: vec![Phase::Running.into()], ..Default::default() };
    let mut times = pages(caller, 1000, Some(running), sandboxes).await?;
    figures.add("list_1000_ms", median(&mut times), "ms", unfiltered, largest);
    // One fulfils this one: all sandboxes are checked for one page.
    let metadata = BTreeMap::from([("session".into(), session(0))]);
    let one = SandboxFilter { metadata, ..Default::default() };
    let mut times = pages(caller, 1000, Some(one), 1).await?;
    figures.add("list_one_of_all_ms", median(&mut times), "ms", unfiltered, largest);
    Ok(())
}

/// Times pages one after the other, and begins again when all `sandboxes` are through.
async fn pages(
    caller: &Caller,
    size: u32,
    filter: Option<SandboxFilter>,
    sandboxes: usize,
) -> Result<Vec<f64>> {
    let (mut times, mut token, mut listed) = (Vec::new(), String::new(), 0);
    while times.len() < PAGES {
        let (took, page) = timed(caller.page(size, &token, filter.clone())).await;
        let (count, next) = page?;
        times.push(took);
        (listed, token) = (listed + count, next);
        if token.is_empty() {
            ensure!(listed == sandboxes, "{listed} sandboxes of {sandboxes} are listed");
            listed = 0;
        }
    }
    Ok(times)
}

async fn all_pages(caller: &Caller) -> Result<usize> {
    let (mut listed, mut token) = (0, String::new());
    loop {
        let (count, next) = caller.page(1000, &token, None).await?;
        listed += count;
        if next.is_empty() {
            return Ok(listed);
        }
        token = next;
    }
}

#[expect(clippy::cast_precision_loss, reason = "a count")]
fn as_f64(count: usize) -> f64 {
    count as f64
}
