//! The way out of the sandboxes: their addresses are masked by their node, and those of the nodes by
//! the lab's network. From there slirp4netns, a plain program, opens connections on the machine:
//! the machine's own network gets no address, no route and no rule.

use std::net::{TcpStream, ToSocketAddrs as _};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::daemons::WAY_OUT;
use crate::lab::Lab;
use crate::layout::NodeId;
use crate::net::{ip_in_lab, netns_file, run_in_lab};
use crate::process::wait_until;
use crate::run::run;
use crate::sources;

/// Network between the lab and slirp4netns.
const NET: &str = "10.99.1.0/24";
/// Name server of the sandboxes: slirp4netns answers there for the machine's own.
pub const NAME_SERVER: &str = "10.99.1.3";
const TAP: &str = "tap0";
/// Networks of the lab. Nothing leaves it for them, and the nodes' own services see no sandbox that
/// looks like a node.
const INSIDE: &str = "{ 10.99.0.0/24, 10.100.0.0/16 }";
const START_WITHIN: Duration = Duration::from_secs(10);
/// Longest attempt to reach the world from the machine, the name server's answer included.
const REACH_WITHIN: Duration = Duration::from_secs(8);
const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// Returns the command line of the service. What listens on the machine's loopback stays out of
/// reach.
pub fn argv() -> Vec<String> {
    let cidr = format!("--cidr={NET}");
    let netns = netns_file().to_string_lossy().into_owned();
    let words = [
        "/usr/bin/slirp4netns",
        "--configure",
        "--disable-host-loopback",
        &cidr,
        "--netns-type=path",
        &netns,
        TAP,
    ];
    words.map(str::to_owned).to_vec()
}

/// Opens the way out of the lab's network; fails on a machine that has none itself.
pub fn start(lab: &Lab) -> Result<()> {
    reach(&sources::mirror(Path::new("/etc/apt")))?;
    open(lab).inspect_err(|_| {
        // Otherwise the supervisor would start it again and again.
        drop(lab.services().stop(WAY_OUT, START_WITHIN));
    })
}

fn open(lab: &Lab) -> Result<()> {
    lab.services().start(WAY_OUT, START_WITHIN)?;
    let connected = || ip_in_lab("route show default").is_ok_and(|route| route.contains(TAP));
    wait_until(START_WITHIN, connected)
        .with_context(|| format!("see {}", lab.layout().logs().join("way-out.log").display()))?;
    // An address of the lab that nobody has must not be looked for outside.
    ip_in_lab("route add unreachable 10.100.0.0/16")?;
    run_in_lab("nft", [masquerade(TAP, &format!("ip saddr {INSIDE}")).as_str()])?;
    run_in_lab("sysctl", ["-qw", "net.ipv4.ip_forward=1"]).map(drop)
}

/// Opens the way out of a node, in whose network namespace this process is.
pub fn open_node(node: NodeId) -> Result<()> {
    let own = format!("ip saddr {}.0/24 ip daddr != {INSIDE}", node.containers_net());
    run("nft", [masquerade("eth0", &own)]).map(drop)
}

/// Returns the commands for `nft`.
fn masquerade(interface: &str, what: &str) -> String {
    format!(
        "add table ip lab; \
         add chain ip lab out {{ type nat hook postrouting priority srcnat; }}; \
         add rule ip lab out oifname {interface} {what} masquerade"
    )
}

/// Connects to a server outside, which the templates come from.
fn reach(url: &str) -> Result<()> {
    let (scheme, rest) = url.split_once("://").context("a URL")?;
    let authority = rest.split('/').next().unwrap_or(rest);
    let port = if scheme == "https" { 443 } else { 80 };
    let address =
        if authority.contains(':') { authority.to_owned() } else { format!("{authority}:{port}") };
    let (tell, told) = mpsc::channel();
    let shown = address.clone();
    // The resolver has no time limit: a thread that waits for it ends with the program.
    std::thread::spawn(move || {
        let reached = address.to_socket_addrs().is_ok_and(|mut all| {
            all.any(|one| TcpStream::connect_timeout(&one, CONNECT_WITHIN).is_ok())
        });
        // Nobody listens after the time limit.
        let _unheard = tell.send(reached);
    });
    match told.recv_timeout(REACH_WITHIN) {
        Ok(true) => Ok(()),
        Ok(false) | Err(_) => bail!("this machine does not reach {shown}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_is_reached_by_its_url() {
        let server = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = server.local_addr().expect("an address");
        reach(&format!("http://{address}/debian")).expect("it listens");
        drop(server);
        assert!(reach(&format!("http://{address}/debian")).is_err());
        assert!(reach("debian").is_err());
    }
}
