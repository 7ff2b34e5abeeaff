//! Judges the node itself: privileges, programs, cluster, disk, and the agent that runs. Pure.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
};

use daemon::doctor::{
    Check,
    reach::{Listener, local},
};

use super::{
    facts::{Agent, Program},
    listeners_of,
    look::AGENT_UNIT,
};
use crate::{
    config::Config,
    hand_edits::Edits,
    pve::{Cluster, HostPaths},
};

/// Free space of the agent's directory below which the journal is in danger, and below which it soon is.
const ROOM_MIN: u64 = 64 << 20;
const ROOM_LOW: u64 = 512 << 20;

pub(super) fn privileges(is_root: bool) -> Check {
    match is_root {
        true => Check::ok("privileges", "", "root"),
        false => Check::warning(
            "privileges",
            "",
            "not root: keys, nftables and storages cannot be looked at",
            "run it again as root",
        ),
    }
}

pub(super) fn programs(programs: &[Program]) -> Vec<Check> {
    let missing = programs.iter().filter(|program| !program.is_there).map(|program| {
        let (path, package) = (program.path.display().to_string(), program.package);
        Check::failed("program", path, "not there", format!("apt-get install {package}"))
    });
    let missing: Vec<_> = missing.collect();
    if !missing.is_empty() {
        return missing;
    }
    let paths: Vec<_> = programs.iter().map(|program| program.path.display().to_string()).collect();
    vec![Check::ok("program", "", format!("all are there: {}", paths.join(", ")))]
}

/// Says that pmxcfs is mounted and does not answer.
pub(super) fn stuck(pve: &HostPaths) -> Check {
    let root = pve.root.display().to_string();
    let found = "pmxcfs does not answer within 3 s: it is stuck, so PVE and the agent can change nothing, and \
                 the rest of this node was not looked at";
    Check::failed("quorum", root, found, "systemctl restart pve-cluster; then run this again")
}

/// Says which configuration files were changed by hand, and were put back.
pub(super) fn edits(edits: &Edits, now_ms: u64) -> Vec<Check> {
    let told = edits.iter().map(|(file, at_ms)| {
        let hours = now_ms.saturating_sub(*at_ms) / 3_600_000 + 1;
        let found = format!("changed by hand, and put back by the agent less than {hours} h ago");
        let remedy = "change agent.toml, or the settings of the tunnel: the agent writes this file from them";
        Check::warning("hand-edit", file.clone(), found, remedy)
    });
    told.collect()
}

pub(super) fn quorum(cluster: &Cluster) -> Check {
    let online = cluster.members.values().filter(|member| member.online).count();
    let all = cluster.members.len();
    match (all, cluster.quorate) {
        (0, _) => Check::failed(
            "quorum",
            "pmxcfs",
            "it does not say which node this is: it is down",
            "systemctl restart pve-cluster",
        ),
        (_, false) => Check::failed(
            "quorum",
            "",
            format!("/etc/pve is read-only here: {online} of {all} nodes are online"),
            "pvecm status; start the nodes that are missing, or mend their network",
        ),
        (_, true) if cluster.maintenance => Check::warning(
            "quorum",
            "",
            "PVE's HA has this node in maintenance: it gets no new sandboxes",
            "ha-manager crm-command node-maintenance disable $(hostname)",
        ),
        (_, true) => Check::ok("quorum", "", format!("{online} of {all} nodes are online")),
    }
}

/// Compares the number that the node's ranges follow from with the one that its cluster gives it.
pub(super) fn number(kept: Option<u32>, cluster: &Cluster) -> Option<Check> {
    let (kept, now) = (kept?, cluster.number?);
    Some(match kept == now {
        true => Check::ok("node-number", "", format!("{now}")),
        false => Check::failed(
            "node-number",
            "",
            format!("the cluster says {now} and the journal {kept}: the node makes no sandboxes"),
            "systemctl stop pve-sandbox-agent; pve-sandbox-agent confirm-node-number; systemctl start \
             pve-sandbox-agent",
        ),
    })
}

pub(super) fn room(state_dir: &Path, free: Option<u64>) -> Check {
    let path = state_dir.display().to_string();
    let remedy = "free space on its file system: apt-get clean; journalctl --vacuum-size=200M";
    match free {
        None => Check::warning("disk", path.clone(), "cannot be looked at", format!("df {path}")),
        Some(free) if free < ROOM_MIN => {
            Check::failed("disk", path, format!("{} MiB are free", free >> 20), remedy)
        }
        Some(free) if free < ROOM_LOW => {
            Check::warning("disk", path, format!("{} MiB are free", free >> 20), remedy)
        }
        Some(free) => Check::ok("disk", path, format!("{} MiB are free", free >> 20)),
    }
}

/// Compares the address that the cluster has for this node with the one that the agent listens on: it is where a
/// controller of the same network looks for it.
pub(super) fn listen(config: &Config, cluster: &Cluster) -> Option<Check> {
    let own = cluster.members.get(&config.node.value)?.ip?;
    unserved(config.listen.value, own)
}

/// Says that the agent listens on all addresses of IPv4, and its node has one of IPv6. On an address of its own the
/// operator has put it, and `join` has told the controller that one.
fn unserved(listen: SocketAddr, own: IpAddr) -> Option<Check> {
    if own.to_canonical().is_ipv4() || listen.is_ipv6() || !listen.ip().is_unspecified() {
        return None;
    }
    let found = format!(
        "it serves no IPv6, and the address of this node in its cluster is {own}: a controller that uses it finds no agent"
    );
    let remedy = format!(
        "set listen = \"[::]:{}\", which serves IPv4, too, at the top of agent.toml; systemctl restart {AGENT_UNIT}",
        listen.port()
    );
    Some(Check::warning("listen", listen.to_string(), found, remedy))
}

pub(super) fn agent(config: &Config, agent: &Agent) -> Option<Check> {
    let address = local(config.listen.value);
    let subject = address.to_string();
    let restart = "systemctl restart pve-sandbox-agent";
    Some(match agent.listener.as_ref()? {
        Listener::Nobody => Check::failed(
            "agent",
            subject,
            "nothing listens: the agent does not run",
            "systemctl enable --now pve-sandbox-agent; why it ended: journalctl -u pve-sandbox-agent -n 20",
        ),
        Listener::Other(why) => Check::failed(
            "agent",
            subject,
            format!("something listens that is not this node's agent, or has another CA: {why}"),
            listeners_of(address),
        ),
        Listener::Accepted(shown) if *shown != agent.on_disk => Check::failed(
            "agent",
            subject,
            "it serves with another certificate than the one on the disk",
            restart,
        ),
        Listener::Accepted(_) if agent.is_replaced => Check::warning(
            "agent",
            subject,
            "an older version runs: its program was replaced after it was started",
            restart,
        ),
        Listener::Accepted(_) => running(subject, agent.starts_at_boot),
    })
}

/// Judges an agent that runs as it should: whether it also does after a boot.
fn running(subject: String, starts_at_boot: Option<bool>) -> Check {
    if starts_at_boot == Some(false) {
        let remedy = format!("systemctl enable {AGENT_UNIT}");
        return Check::warning("agent", subject, "it runs, but a boot does not start it", remedy);
    }
    let version = daemon::version::get();
    Check::ok("agent", subject, format!("it answers; this program is {version}"))
}

/// Says what the agent that runs may not do and has to: its unit was changed, or something around it.
pub(super) fn capabilities(agent: &Agent) -> impl Iterator<Item = Check> {
    agent.missing.iter().map(|missing| {
        Check::warning(
            "capability",
            missing.name.clone(),
            format!("the agent lacks it; it is needed for {}", missing.needed_for),
            "systemctl cat pve-sandbox-agent shows which file bounds CapabilityBoundingSet; remove that, \
             systemctl daemon-reload and systemctl restart pve-sandbox-agent",
        )
    })
}

#[cfg(test)]
mod tests {
    use daemon::doctor::State;

    use super::*;
    use crate::pve::Member;

    fn cluster(quorate: bool) -> Cluster {
        let member = |online| Member { ip: None, online };
        let name = |text: &str| text.parse().expect("a name");
        let members = [(name("pve1"), member(true)), (name("pve2"), member(false))].into();
        Cluster { quorate, number: Some(2), members, ..Cluster::default() }
    }

    #[test]
    fn quorum_is_lost_with_pmxcfs_and_with_the_majority() {
        assert_eq!(quorum(&cluster(true)).found, "1 of 2 nodes are online");
        let lost = quorum(&cluster(false));
        assert!(lost.state == State::Failed && lost.remedy.is_some_and(|r| r.contains("pvecm")));
        let down = quorum(&Cluster::default()).remedy;
        assert_eq!(down.as_deref(), Some("systemctl restart pve-cluster"));
        let maintained = quorum(&Cluster { maintenance: true, ..cluster(true) });
        assert_eq!(maintained.state, State::Warning);
    }

    #[test]
    fn lost_majority_is_found_and_ends_with_the_node_that_its_remedy_starts() {
        let lost = quorum(&cluster(false));
        assert_eq!(lost.found, "/etc/pve is read-only here: 1 of 2 nodes are online");
        assert!(lost.remedy.is_some_and(|remedy| remedy.contains("start the nodes")));
        let mut whole = cluster(true);
        whole.members.values_mut().for_each(|member| member.online = true);
        let found = quorum(&whole);
        assert_eq!((found.state, found.found.as_str()), (State::Ok, "2 of 2 nodes are online"));
    }

    #[test]
    fn change_by_hand_is_told_with_its_age() {
        let edit = Edits::from([("/etc/pve-sandbox/caddy.json".to_owned(), 1000)]);
        let found = edits(&edit, 1000 + 2 * 3_600_000);
        assert_eq!((found.len(), found[0].state), (1, State::Warning));
        assert_eq!(found[0].subject, "/etc/pve-sandbox/caddy.json");
        assert!(found[0].found.contains("less than 3 h ago"), "{found:?}");
        assert_eq!(edits(&Edits::new(), 0), []);
    }

    #[test]
    fn disk_without_space_is_found_and_free_space_mends_it() {
        let room = |free| room(Path::new("/var/lib/x"), free);
        let full = room(Some(ROOM_MIN - 1));
        assert_eq!((full.state, full.found.as_str()), (State::Failed, "63 MiB are free"));
        assert_eq!(room(Some(ROOM_LOW - 1)).state, State::Warning);
        assert!(full.remedy.is_some_and(|remedy| remedy.starts_with("free space")));
        assert_eq!(room(Some(ROOM_LOW)).state, State::Ok);
        let unknown = room(None);
        assert_eq!(unknown.remedy.as_deref(), Some("df /var/lib/x"));
    }

    #[test]
    fn number_of_the_node_is_that_of_the_journal() {
        let state = |kept| number(kept, &cluster(true)).map(|check| check.state);
        assert_eq!(state(Some(2)), Some(State::Ok));
        assert_eq!(state(Some(3)), Some(State::Failed));
        assert_eq!(state(None), None);
    }

    #[test]
    fn agent_that_serves_no_ipv6_on_a_node_of_ipv6_is_found_and_the_remedy_mends_it() {
        let judged = |listen: &str, own: &str| {
            unserved(listen.parse().expect("an address"), own.parse().expect("an address"))
        };
        let found = judged("0.0.0.0:7445", "2001:db8::3").expect("nobody listens there");
        assert_eq!((found.name, found.state), ("listen", State::Warning));
        let remedy = found.remedy.unwrap_or_default();
        assert!(remedy.starts_with("set listen = \"[::]:7445\""), "{remedy}");
        for (listen, own) in [
            ("[::]:7445", "2001:db8::3"),
            ("[::]:7445", "10.0.0.3"),
            ("0.0.0.0:7445", "10.0.0.3"),
            ("10.0.0.3:7445", "2001:db8::3"),
        ] {
            assert_eq!(judged(listen, own), None, "{listen} at {own}");
        }
    }

    #[test]
    fn missing_program_is_told_with_its_package() {
        let program =
            |path: &str, is_there| Program { path: path.into(), package: "nftables", is_there };
        let all = programs(&[program("/a", true), program("/b", true)]);
        assert_eq!((all.len(), all[0].state), (1, State::Ok));
        let one = programs(&[program("/a", true), program("/b", false)]);
        assert_eq!((one.len(), one[0].subject.as_str()), (1, "/b"));
        assert_eq!(one[0].remedy.as_deref(), Some("apt-get install nftables"));
        assert_eq!(privileges(false).state, State::Warning);
    }

    #[test]
    fn agent_that_a_boot_does_not_start_is_a_warning() {
        let judge = |at_boot| running("127.0.0.1:1".to_owned(), at_boot);
        for unsuspicious in [Some(true), None] {
            assert_eq!(judge(unsuspicious).state, State::Ok);
        }
        let found = judge(Some(false));
        assert_eq!(found.state, State::Warning);
        assert_eq!(found.found, "it runs, but a boot does not start it");
        assert_eq!(found.remedy.as_deref(), Some("systemctl enable pve-sandbox-agent"));
    }
}
