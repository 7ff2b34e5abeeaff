//! Ports that may be exposed, and who reaches them where the caller does not say it.

use std::collections::BTreeSet;

use proto::{
    Reason,
    agent::v1::PortRules,
    name::Port,
    sandbox::v1::{CreateSandboxRequest, HttpService, Sandbox, Visibility as Wire},
    spec::Spec,
    visibility::Visibility,
};

use super::{Error, Result};
use crate::node::Node;

/// Rules for ports, by the operator's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exposure {
    /// Visibility of a port whose caller does not say it.
    pub default: Visibility,
    /// Ports that may never be exposed.
    pub denied: BTreeSet<Port>,
}

impl Default for Exposure {
    fn default() -> Self {
        Self { default: Visibility::Team, denied: BTreeSet::new() }
    }
}

impl Exposure {
    /// Returns who reaches a port whose caller does not say it.
    pub(super) fn default_of(&self, port: Port) -> Visibility {
        self.default.or_guarded(port)
    }

    /// Returns the rules for ports that a node exposes because their snapshot says so.
    pub(super) fn port_rules(&self) -> PortRules {
        let mut rules = PortRules {
            denied_ports: self.denied.iter().map(|port| u32::from(*port)).collect(),
            ..PortRules::default()
        };
        rules.set_default_visibility(self.default.into());
        rules
    }

    /// Completes the default services of a snapshot as its sandboxes get them: with their visibility, and without
    /// denied ports.
    pub(super) fn default_services(&self, services: Vec<HttpService>) -> Vec<HttpService> {
        let complete = |mut service: HttpService| {
            let port = Port::try_from(service.port).ok()?;
            self.check(port).ok()?;
            let said = Visibility::read(service.visibility, "visibility").ok()?;
            service.set_visibility(said.unwrap_or_else(|| self.default_of(port)).into());
            Some(service)
        };
        services.into_iter().filter_map(complete).collect()
    }

    /// Checks that a port may be exposed.
    ///
    /// # Errors
    /// PORT_DENIED when the operator does not allow it.
    pub(super) fn check(&self, port: Port) -> Result<()> {
        if !self.denied.contains(&port) {
            return Ok(());
        }
        let why = format!("port {port} may not be exposed here: use another port");
        Err(Error::new(Reason::PortDenied, why))
    }

    /// Checks the ports of a creation, and writes down who reaches them where it does not say so.
    ///
    /// # Errors
    /// As `check`; FIELD_INVALID when a port is none.
    pub(super) fn complete(
        &self,
        request: &mut CreateSandboxRequest,
        spec: &mut Spec,
    ) -> Result<()> {
        for service in &mut request.services {
            let port = Port::try_from(service.port)?;
            self.check(port)?;
            let who = spec.visibility.entry(port).or_insert_with(|| self.default_of(port));
            service.set_visibility((*who).into());
        }
        Ok(())
    }
}

/// Returns true when a port is not open to everybody. An older node says nothing: there, all are.
pub(super) fn is_guarded(service: &HttpService) -> bool {
    !matches!(service.visibility(), Wire::Unspecified | Wire::Public)
}

/// Returns true when all of a sandbox's open ports are public, as an older node would have them.
pub(super) fn are_public(sandbox: &Sandbox) -> bool {
    !sandbox.services.iter().any(is_guarded)
}

/// Returns true when a port that not everybody should reach is open to all after it was exposed. An agent that knows
/// of no visibility says nothing. Where the caller wanted none, a port that was public has stayed so.
pub(super) fn is_too_open(sandbox: &Sandbox, port: Port, wanted: Option<Visibility>) -> bool {
    let number = u32::from(port);
    let of_port = sandbox.services.iter().filter(|service| service.port == number);
    of_port.map(HttpService::visibility).any(|has| match has {
        Wire::Unspecified => true,
        Wire::Public => wanted.is_some_and(|wanted| wanted != Visibility::Public),
        Wire::Team | Wire::Token | Wire::Private => false,
    })
}

/// State of a port by the words of its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Openness {
    Closed,
    /// The node knows who reaches it, everybody included.
    Guarded,
    /// The node knows of no visibility: everybody reaches it.
    Everybody,
}

/// Returns what the sandbox's node says of a port.
pub(super) fn openness(sandbox: &Sandbox, port: Port) -> Openness {
    let number = u32::from(port);
    let mut of_port = sandbox.services.iter().filter(|service| service.port == number);
    match of_port.next().map(HttpService::visibility) {
        None => Openness::Closed,
        Some(Wire::Unspecified) => Openness::Everybody,
        Some(Wire::Public | Wire::Team | Wire::Token | Wire::Private) => Openness::Guarded,
    }
}

/// Checks that a node knows of visibility.
///
/// # Errors
/// VISIBILITY_UNSUPPORTED when it runs an older version, NODE_UNREACHABLE while its version is not known.
pub(super) fn can_guard(node: &Node) -> Result<()> {
    match node.guards_ports() {
        Some(true) => return Ok(()),
        Some(false) => {}
        None => return Err(Error::unreachable(&node.name, "it is not connected")),
    }
    let why = format!(
        "the agent of {} is too old: every open port there is public. Upgrade it, or expose the port as public",
        node.name
    );
    Err(Error::new(Reason::VisibilityUnsupported, why))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(number: u32) -> Port {
        Port::try_from(number).expect("a port")
    }

    #[test]
    fn port_is_too_open_where_its_node_says_nothing_or_does_not_obey() {
        let has = |number, who: Wire| {
            let service =
                HttpService { port: number, visibility: who.into(), ..HttpService::default() };
            Sandbox { services: vec![service], ..Sandbox::default() }
        };
        let team = Some(Visibility::Team);
        for (who, wanted, expected) in [
            (Wire::Unspecified, team, true),
            (Wire::Unspecified, None, true),
            (Wire::Public, team, true),
            (Wire::Public, None, false),
            (Wire::Public, Some(Visibility::Public), false),
            (Wire::Team, team, false),
            (Wire::Private, None, false),
        ] {
            assert_eq!(
                is_too_open(&has(80, who), port(80), wanted),
                expected,
                "{who:?} {wanted:?}"
            );
        }
        assert!(!is_too_open(&has(81, Wire::Public), port(80), team), "another port");
    }

    #[test]
    fn creation_says_who_reaches_its_ports() {
        let rules = Exposure { default: Visibility::Public, denied: [port(22)].into() };
        let service = |port, visibility: Wire| HttpService {
            port,
            visibility: visibility.into(),
            ..HttpService::default()
        };
        let given = [(80, Wire::Unspecified), (81, Wire::Private), (39_375, Wire::Unspecified)];
        let explicit = [(39_383, Wire::Public)];
        let services = given.into_iter().chain(explicit).map(|(port, who)| service(port, who));
        let mut request = CreateSandboxRequest {
            request_id: "r".into(),
            snapshot_id: "base".into(),
            services: services.collect(),
            ..Default::default()
        };
        let mut spec = Spec::try_from(&request).expect("valid");
        rules.complete(&mut request, &mut spec).expect("allowed");
        assert_eq!(spec.visibility.get(&port(80)), Some(&Visibility::Public));
        let who: Vec<_> = request.services.iter().map(HttpService::visibility).collect();
        assert_eq!(who, [Wire::Public, Wire::Private, Wire::Team, Wire::Public]);
        request.services.push(service(22, Wire::Private));
        let error = rules.complete(&mut request, &mut spec).expect_err("denied");
        assert_eq!(error.reason, Reason::PortDenied);
    }
}
