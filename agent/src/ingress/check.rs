//! Checks that route questions are answered correctly, over the socket, as Caddy asks them. The
//! questions wake no sandbox and do not count as use of one.

use std::{collections::BTreeSet, io, path::PathBuf, sync::Arc, time::Duration};

use proto::{Invariant, id::Vmid, name::Port};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::timeout,
};

use super::decide::Domain;
use crate::sandbox::{
    Sandboxes,
    drift::fsck::{Check, Finding},
};

/// Most sandboxes that are checked, of the live and of the ended ones each.
const ASKED_MAX: usize = 64;
/// Longest wait for one answer.
const ANSWER: Duration = Duration::from_secs(3);
/// Longest answer, in bytes.
const ANSWER_MAX: u64 = 4096;
/// Expected status for a closed port of a live sandbox.
const CLOSED: u16 = 403;
/// Expected status for a sandbox that has ended.
const GONE: u16 = 410;

/// Check of the ingress by route questions.
#[derive(Debug)]
pub struct IngressCheck {
    /// Socket of the agent's route server.
    pub socket: PathBuf,
    /// Domain of the sandboxes' host names.
    pub domain: Domain,
    /// Sandboxes of this node.
    pub sandboxes: Arc<Sandboxes>,
}

#[async_trait::async_trait]
impl Check for IngressCheck {
    async fn check(&self) -> Vec<Finding> {
        let mut findings: Vec<Finding> = Vec::new();
        let live = self.sandboxes.live();
        let taken: BTreeSet<Vmid> = live.iter().map(|record| record.vmid).collect();
        let of_live = live.iter().take(ASKED_MAX).filter_map(|record| {
            let open: BTreeSet<Port> = record.open_ports().iter().map(|open| open.port).collect();
            Some((record.id, record.vmid, closed(&open)?, CLOSED))
        });
        let mut ended = self.sandboxes.ended();
        ended.sort_by_key(|tombstone| std::cmp::Reverse(tombstone.ended_ms));
        // Of one that moved, the node that has it answers.
        ended.retain(|tombstone| !tombstone.moved && !taken.contains(&tombstone.vmid));
        let of_ended = ended.iter().take(ASKED_MAX).filter_map(|tombstone| {
            Some((tombstone.id, tombstone.vmid, closed(&BTreeSet::new())?, GONE))
        });
        for (id, vmid, port, due) in of_live.chain(of_ended) {
            findings.extend(self.ask(id.to_string(), vmid, port, due).await);
            // It took seconds, and the others would get no answer either.
            if findings.last().is_some_and(|finding| finding.invariant == Invariant::Unchecked) {
                break;
            }
        }
        findings
    }
}

impl IngressCheck {
    async fn ask(&self, subject: String, vmid: Vmid, port: Port, due: u16) -> Option<Finding> {
        let host = format!("port-{port}-vm-{vmid}.{}", self.domain);
        match timeout(ANSWER, self.status(&host)).await {
            Ok(Ok(status)) if status == due => None,
            // The sandbox began, ended, or was deleted during the check.
            Ok(Ok(_)) if self.moved(vmid, due) => None,
            Ok(Ok(status)) => {
                let detail = format!("a request for {host} is answered with {status}, not {due}");
                Some(Finding::new(Invariant::I5, subject, detail))
            }
            Ok(Err(error)) => {
                let detail = format!("the route question for {host} failed: {error}");
                Some(Finding::new(Invariant::Unchecked, subject, detail))
            }
            Err(_) => {
                let detail = format!("the route question for {host} was not answered");
                Some(Finding::new(Invariant::Unchecked, subject, detail))
            }
        }
    }

    fn moved(&self, vmid: Vmid, due: u16) -> bool {
        let lives = self.sandboxes.live().iter().any(|record| record.vmid == vmid);
        lives != (due == CLOSED)
    }

    async fn status(&self, host: &str) -> io::Result<u16> {
        let mut stream = UnixStream::connect(&self.socket).await?;
        let question = format!("GET /v1/route?via=peer&rid=fsck HTTP/1.1\r\nHost: {host}\r\n\r\n");
        stream.write_all(question.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER_MAX).read_to_end(&mut answer).await?;
        let text = String::from_utf8_lossy(&answer);
        let status = text.split(' ').nth(1).and_then(|code| code.parse().ok());
        status.ok_or_else(|| io::Error::other("no answer of HTTP"))
    }
}

/// Returns the lowest port that is not open.
fn closed(open: &BTreeSet<Port>) -> Option<Port> {
    (1..=u32::from(u16::MAX))
        .filter_map(|port| Port::try_from(port).ok())
        .find(|p| !open.contains(p))
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{
        ingress::{
            Owner, Routes, Target,
            caddy::Proof,
            decide::Rules,
            hold::{Holds, Limits},
            owner_resolver::{OwnerResolver, Sources},
            probe::Probe,
            routes::NodeRoutes,
            server::{self, Ingress},
        },
        name_directory::NameDirectory,
        pve::fake::Pace,
        revoked::Revoked,
        sandbox::tests::{LONG, Node, id},
    };
    use proto::{
        host::FullName,
        id::{SandboxId, SandboxRef, Vmid},
    };

    /// Table without any sandbox.
    #[derive(Debug)]
    struct Nobody;

    #[async_trait::async_trait]
    impl Routes for Nobody {
        fn local(&self, _: SandboxRef) -> Option<Target> {
            None
        }

        fn named(&self, _: &FullName) -> Option<SandboxId> {
            None
        }

        async fn owner(&self, _: SandboxRef) -> Owner {
            Owner::Nobody
        }

        fn used(&self, _: &SandboxId) {}

        async fn on_loopback(&self, _: Vmid, _: u16) -> bool {
            false
        }

        async fn wake(&self, _: SandboxRef) {}
    }

    fn serve(path: &std::path::Path, routes: Arc<dyn Routes>) -> CancellationToken {
        let listener = server::listen(path, None).expect("a socket");
        let config = path.with_extension("json");
        std::fs::write(config.with_extension("proof"), "0".repeat(64)).expect("written");
        let ingress = Ingress {
            routes,
            rules: Rules {
                domain: "sbx.test".parse().expect("a domain"),
                parents: Vec::new(),
                cors: true,
            },
            clock: Arc::new(crate::clock::SystemClock::default()),
            proof: Proof::read(&config).expect("a proof"),
            probe: Probe::default(),
            revoked: Arc::new(Revoked::load(path.with_extension("revoked")).expect("none")),
            metrics: Arc::default(),
            holds: Holds::new(Limits::default()),
        };
        let stop = CancellationToken::new();
        tokio::spawn(server::serve(listener, Arc::new(ingress), stop.clone()));
        stop
    }

    #[tokio::test]
    async fn only_wrong_or_missing_route_answers_are_reported() {
        let node = Node::new().await;
        node.cluster.set_pace(Pace::default());
        node.running(1).await;
        node.running(2).await;
        node.sandboxes.delete(&id(2), LONG).await.expect("deleted");
        let moved = node.running(3).await;
        node.sandboxes.stop(&id(3), LONG).await.expect("stopped");
        node.cluster.migrate(moved.vmid, &node.other());
        node.sandboxes.forget_moved(&id(3), &node.other(), LONG).await.expect("forgotten");
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("ingress.sock");
        let check = IngressCheck {
            socket: socket.clone(),
            domain: "sbx.test".parse().expect("a domain"),
            sandboxes: Arc::clone(&node.sandboxes),
        };
        let sources = Sources {
            root: dir.path().to_owned(),
            memory: dir.path().join("owners"),
            peer_port: 8481,
        };
        let names = Arc::new(NameDirectory::load(dir.path().join("names")));
        let clock = Arc::clone(&node.clock) as Arc<dyn crate::clock::Clock>;
        let pve = node.cluster.node(&node.name);
        let owners = Arc::new(OwnerResolver::new(pve, clock, sources));
        let routes = NodeRoutes::new(Arc::clone(&node.sandboxes), owners, names);
        let right = serve(&socket, Arc::new(routes));
        assert_eq!(check.check().await, []);
        right.cancel();
        let wrong = serve(&socket, Arc::new(Nobody));
        let invariants: Vec<_> = check.check().await.iter().map(|f| f.invariant).collect();
        assert_eq!(invariants, [Invariant::I5, Invariant::I5]);
        wrong.cancel();
        std::fs::remove_file(&socket).expect("removed");
        let invariants: Vec<_> = check.check().await.iter().map(|f| f.invariant).collect();
        assert_eq!(invariants, [Invariant::Unchecked], "one says it all");
    }
}
