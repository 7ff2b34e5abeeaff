//! Default services: ports that the sandboxes of a snapshot expose from their creation on.

use proto::spec::{Spec, limit};

use crate::{
    journal::{ListenRule, PortRules, Record},
    sandbox::{DefaultPorts, DefaultService},
};

/// Opens the default services of a snapshot in the record of a new sandbox, and notes its rule for ports that something
/// listens on. What the caller asks for is in the record already, and counts more. A service that cannot be opened is
/// left closed: it must not make the creation fail.
pub(super) fn apply(record: &mut Record, ports: &DefaultPorts, spec: &Spec, rules: &PortRules) {
    let services = if spec.no_default_services { &[] } else { ports.services.as_slice() };
    for service in services {
        if let Err(why) = open(record, service, rules) {
            let DefaultService { name, port, .. } = service;
            tracing::warn!(
                sandbox_id = %record.id, snapshot = %record.snapshot, %name, %port,
                "a default service is left closed: {why}"
            );
        }
    }
    let by_snapshot = ports.on_listen && !spec.no_default_services;
    let on_listen = spec.expose_on_listen.unwrap_or(by_snapshot);
    record.access.listen = on_listen.then(|| ListenRule::new(rules.clone()));
}

fn open(
    record: &mut Record,
    service: &DefaultService,
    rules: &PortRules,
) -> Result<(), &'static str> {
    let DefaultService { name, port, visibility } = service;
    // The caller uses the name or the port for a service of its own.
    if record.port_named(name).is_some() || record.visibility(*port).is_some() {
        return Ok(());
    }
    if rules.denied.contains(port) {
        return Err("the controller denies its port");
    }
    if record.open_ports().len() >= limit::SERVICES_MAX {
        return Err("the sandbox has 32 open ports already");
    }
    record.open((name.clone(), *port), *visibility, rules.visibility(*port));
    Ok(())
}
