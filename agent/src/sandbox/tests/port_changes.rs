//! Changes of open ports, as operations that `syncs` crashes. Each begins with what callers were told before: a port
//! is hidden, and the credentials of another one are revoked. No crash may take either back.

use proto::visibility::Visibility;

use super::{
    default_ports::rules,
    ports::{port, wanted},
    *,
};
use crate::sandbox::access::credential::Purpose;

/// Port that the change is about, with the service "web".
const WEB: u32 = 80;
/// Port with the service "other", whose credentials were revoked.
const OTHER: u32 = 82;
/// Port that was open and is hidden; a server listens on it.
const HIDDEN: u32 = 8081;
/// Port that a server listens on, and that nobody has exposed.
const LISTENING: u32 = 8080;

/// Change of an open port, or of who reaches it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PortChange {
    Expose,
    Hide,
    /// A public port becomes one that takes tokens.
    Guard,
    /// All credentials of a port become void.
    Revoke,
    /// A port is exposed because something listens on it.
    ExposeOnListen,
}

/// Credentials from before the change.
#[derive(Debug)]
pub(super) struct Given {
    /// Void: the credentials of its port were revoked.
    revoked: String,
    /// Good: made after the revocation.
    kept: String,
    /// Good for the port of the change, where that takes tokens before it.
    web: Option<String>,
}

impl PortChange {
    /// Brings a sandbox to the moment before the change.
    pub(super) async fn prepare(self, node: &Node) -> Given {
        let mut ruled = order(1);
        ruled.port_rules = Some(rules(Visibility::Team, &[]));
        ruled.spec.expose_on_listen = Some(true);
        let record = node.sandboxes.create(ruled, LONG).await.expect("admitted");
        assert_eq!(record.phase, Phase::Running, "{record:?}");
        node.open("closed", HIDDEN, wanted(Visibility::Public)).await;
        node.hide("closed").await;
        node.open("other", OTHER, wanted(Visibility::Token)).await;
        let revoked = node.link("other", None).await.expect("made");
        node.sandboxes.revoke_access(&id(1), "other".into()).await.expect("revoked");
        let kept = node.link("other", None).await.expect("made");
        let before = match self {
            Self::Hide | Self::Revoke => Some(Visibility::Token),
            Self::Guard => Some(Visibility::Public),
            Self::Expose | Self::ExposeOnListen => None,
        };
        if let Some(before) = before {
            node.open("web", WEB, wanted(before)).await;
        }
        let web = match before {
            Some(Visibility::Token) => Some(node.link("web", None).await.expect("made")),
            Some(_) | None => None,
        };
        let all = [HIDDEN, LISTENING].map(|port| format!("0.0.0.0:{port}"));
        let all = all.map(|at| at.parse().expect("an address"));
        node.cluster.listen(record.vmid, &all);
        Given { revoked, kept, web }
    }

    /// Runs to the end of the change, or of the agent.
    pub(super) async fn run(self, node: &Node) {
        match self {
            Self::Expose | Self::Guard => {
                let opened = node.open("web", WEB, wanted(Visibility::Token)).await;
                assert_eq!(opened, Some(Visibility::Token));
            }
            Self::Hide => node.hide("web").await,
            Self::Revoke => {
                let revoked = node.sandboxes.revoke_access(&id(1), "web".into()).await;
                assert_eq!(revoked.expect("revoked").1, port(WEB));
            }
            Self::ExposeOnListen => {
                let exposed = node.sandboxes.expose_listening().await;
                assert_eq!(exposed, [(id(1), port(LISTENING))]);
            }
        }
    }

    /// Checks the ports of the next agent, and returns whether the change was made. One that was not is made then.
    pub(super) async fn check(self, node: &Node, given: &Given) -> bool {
        let made = self.is_made(node, given).await;
        let running = node.record(1).await.phase == Phase::Running;
        // Nothing listens in a sandbox that a power cut has stopped.
        if !made && (running || self != Self::ExposeOnListen) {
            self.run(node).await;
            assert!(self.is_made(node, given).await, "{self:?} is made at last");
        }
        // Whatever listens, what a caller has hidden stays closed.
        node.sandboxes.expose_listening().await;
        assert_eq!(node.record(1).await.visibility(port(HIDDEN)), None, "{self:?}");
        made
    }

    /// Checks that the change was made in full or not at all, and that nothing else has changed.
    async fn is_made(self, node: &Node, given: &Given) -> bool {
        let token = Purpose::Token;
        let record = node.record(1).await;
        assert_eq!(record.visibility(port(HIDDEN)), None, "{self:?}: hidden before");
        assert_eq!(record.visibility(port(OTHER)), Some(Visibility::Token), "{self:?}");
        assert!(!node.opens(&given.revoked, token, OTHER).await, "{self:?}: void before");
        assert!(node.opens(&given.kept, token, OTHER).await, "{self:?}: good before");
        let (web, listening) = (record.visibility(port(WEB)), record.visibility(port(LISTENING)));
        let good = match &given.web {
            Some(text) => node.opens(text, token, WEB).await,
            None => false,
        };
        let state = (web, good, listening);
        let (before, after) = match self {
            Self::Expose => ((None, false, None), (Some(Visibility::Token), false, None)),
            Self::Hide => ((Some(Visibility::Token), true, None), (None, false, None)),
            Self::Guard => {
                ((Some(Visibility::Public), false, None), (Some(Visibility::Token), false, None))
            }
            Self::Revoke => {
                ((Some(Visibility::Token), true, None), (Some(Visibility::Token), false, None))
            }
            Self::ExposeOnListen => ((None, false, None), (None, false, Some(Visibility::Team))),
        };
        assert!(state == before || state == after, "{self:?}: {state:?}");
        state == after
    }
}
