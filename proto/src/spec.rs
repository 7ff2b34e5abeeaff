//! Checked creation. The controller and the agent both check every field here, so that nothing
//! unchecked reaches a PVE config, a command line or an environment.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use crate::egress::Egress;
use crate::{
    id::Invalid,
    lifetime::LifetimePatch,
    name::{Label, NodeName, Port, RequestId, SandboxName, ServiceName, SnapshotId},
    sandbox::v1 as wire,
    secret::Env,
    visibility::Visibility,
};

/// Limits of a request. The comments of the .proto files state the same.
pub mod limit {
    /// Most cores of one sandbox.
    pub const CORES_MAX: u32 = 64;
    /// Memory of one sandbox, in MiB.
    pub const MEMORY_MIB: std::ops::RangeInclusive<u32> = 64..=524_288;
    /// Largest root disk of one sandbox, in GiB.
    pub const DISK_GIB_MAX: u32 = 16_384;
    /// Most metadata entries.
    pub const METADATA_MAX: usize = 32;
    /// Most bytes of a metadata key.
    pub const METADATA_KEY_BYTES_MAX: usize = 63;
    /// Most bytes of a metadata value.
    pub const METADATA_VALUE_BYTES_MAX: usize = 1024;
    /// Most environment variables of a sandbox, or of one command.
    pub const ENV_MAX: usize = 64;
    /// Most bytes of a whole environment.
    pub const ENV_BYTES_MAX: usize = 32 * 1024;
    /// Most open ports of one sandbox.
    pub const SERVICES_MAX: usize = 32;
    /// Most labels in one list.
    pub const LABELS_MAX: usize = 8;
}

/// Compute and storage of a sandbox; 0 means the default of the snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// CPU cores.
    pub cpu_cores: u32,
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// Root disk, in GiB.
    #[serde(default)]
    pub disk_gib: u32,
}

impl Size {
    /// Returns the memory in bytes.
    pub fn memory_bytes(self) -> u64 {
        u64::from(self.memory_mib) << 20
    }

    /// Returns this size, with the fields that are 0 taken from `default`.
    #[must_use]
    pub fn or(self, default: Self) -> Self {
        let pick = |own, other| if own == 0 { other } else { own };
        Self {
            cpu_cores: pick(self.cpu_cores, default.cpu_cores),
            memory_mib: pick(self.memory_mib, default.memory_mib),
            disk_gib: pick(self.disk_gib, default.disk_gib),
        }
    }
}

impl From<Size> for wire::Size {
    fn from(size: Size) -> Self {
        let Size { cpu_cores, memory_mib, disk_gib } = size;
        Self { cpu_cores, memory_mib, disk_gib }
    }
}

impl From<wire::Size> for Size {
    fn from(size: wire::Size) -> Self {
        let wire::Size { cpu_cores, memory_mib, disk_gib } = size;
        Self { cpu_cores, memory_mib, disk_gib }
    }
}

/// Source of a sandbox's IP address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// Static address, leased from the node's pool.
    Static,
    /// DHCP server on the node's bridge.
    Dhcp,
}

/// Checked creation request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Idempotency key of the caller.
    pub request_id: RequestId,
    /// Snapshot to create from.
    pub snapshot: SnapshotId,
    /// Compute and storage; 0 means the default of the snapshot.
    pub size: Size,
    /// Key/value pairs of the caller.
    pub metadata: BTreeMap<String, String>,
    /// Environment variables of every command.
    pub env: Env,
    /// Source of the IP address.
    pub network: Network,
    /// Reach of a sandbox outside of itself; `None`: by default.
    pub egress: Option<Egress>,
    /// Ports that are open from the start.
    pub services: BTreeMap<ServiceName, Port>,
    /// Visibility of these ports, where the request says it.
    pub visibility: BTreeMap<Port, Visibility>,
    /// Whether the default services of the snapshot stay closed.
    pub no_default_services: bool,
    /// Whether ports are exposed as soon as something listens on them; `None`: as the snapshot says.
    pub expose_on_listen: Option<bool>,
    /// Node that the sandbox must be on.
    pub node: Option<NodeName>,
    /// Name of the sandbox.
    pub name: Option<SandboxName>,
    /// Lifetime rules.
    pub lifetime: LifetimePatch,
    /// Requirements and preferences for the node.
    pub labels: Labels,
}

/// Requirements and preferences of a creation for its node, by the labels of nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Labels {
    /// Labels that the node must have, all of them.
    pub require: Vec<Label>,
    /// Labels that the node must not have, none of them.
    pub forbid: Vec<Label>,
    /// Labels that each make a node better.
    pub prefer: Vec<Label>,
    /// Labels that each make a node worse.
    pub avoid: Vec<Label>,
}

impl TryFrom<&wire::Placement> for Labels {
    type Error = Invalid;

    fn try_from(placement: &wire::Placement) -> Result<Self, Invalid> {
        let wire::Placement { require, forbid, prefer, avoid } = placement;
        let parsed = |what: &str, labels: &[String]| -> Result<Vec<Label>, Invalid> {
            if labels.len() > limit::LABELS_MAX {
                return Err(Invalid::new(
                    format!("placement.{what}"),
                    "must have at most 8 labels",
                ));
            }
            let parse = |(index, label): (usize, &String)| {
                let here = format!("placement.{what}[{index}]");
                label.parse().map_err(|invalid: Invalid| invalid.named(here))
            };
            labels.iter().enumerate().map(parse).collect()
        };
        Ok(Self {
            require: parsed("require", require)?,
            forbid: parsed("forbid", forbid)?,
            prefer: parsed("prefer", prefer)?,
            avoid: parsed("avoid", avoid)?,
        })
    }
}

impl TryFrom<&wire::CreateSandboxRequest> for Spec {
    type Error = Invalid;

    fn try_from(request: &wire::CreateSandboxRequest) -> Result<Self, Invalid> {
        let size = check_size(request.size.unwrap_or_default())?;
        check_metadata(&request.metadata)?;
        check_env(&request.env)?;
        let network = match request.network() {
            wire::NetworkMode::Unspecified | wire::NetworkMode::Static => Network::Static,
            wire::NetworkMode::Dhcp => Network::Dhcp,
        };
        if wire::NetworkMode::try_from(request.network).is_err() {
            return Err(Invalid::new("network", "must be STATIC or DHCP"));
        }
        Ok(Self {
            request_id: request.request_id.parse()?,
            snapshot: request.snapshot_id.parse()?,
            size,
            metadata: request.metadata.clone(),
            env: request.env.clone().into(),
            network,
            egress: Egress::read(request.egress, &request.egress_names, "egress")?,
            services: services(&request.services)?,
            visibility: visibility(&request.services)?,
            lifetime: request
                .lifetime
                .as_ref()
                .map(LifetimePatch::try_from)
                .transpose()?
                .unwrap_or_default(),
            labels: request
                .placement
                .as_ref()
                .map(Labels::try_from)
                .transpose()?
                .unwrap_or_default(),
            no_default_services: request.no_default_services,
            expose_on_listen: request.expose_on_listen,
            node: (!request.node.is_empty()).then(|| request.node.parse()).transpose()?,
            name: (!request.name.is_empty()).then(|| request.name.parse()).transpose()?,
        })
    }
}

/// Checks the name and the port of a service. An empty name becomes `port-{port}`.
///
/// # Errors
/// When the name or the port does not have the required form.
pub fn service(name: &str, port: u32) -> Result<(ServiceName, Port), Invalid> {
    let port = Port::try_from(port)?;
    let name = if name.is_empty() { format!("port-{port}") } else { name.to_owned() };
    Ok((name.parse()?, port))
}

fn services(list: &[wire::HttpService]) -> Result<BTreeMap<ServiceName, Port>, Invalid> {
    if list.len() > limit::SERVICES_MAX {
        return Err(Invalid::new("services", "must be at most 32"));
    }
    let mut services = BTreeMap::new();
    for (index, entry) in list.iter().enumerate() {
        let here = |invalid: Invalid| invalid.under(format_args!("services[{index}]"));
        let (name, port) = service(&entry.name, entry.port).map_err(here)?;
        if services.insert(name, port).is_some() {
            return Err(here(Invalid::new("name", "must not be given twice")));
        }
    }
    Ok(services)
}

/// Reads who reaches the ports of valid services.
fn visibility(list: &[wire::HttpService]) -> Result<BTreeMap<Port, Visibility>, Invalid> {
    let mut ports = BTreeMap::new();
    for (index, entry) in list.iter().enumerate() {
        let field = format!("services[{index}].visibility");
        let Some(wanted) = Visibility::read(entry.visibility, &field)? else { continue };
        if ports.insert(Port::try_from(entry.port)?, wanted).is_some_and(|other| other != wanted) {
            return Err(Invalid::new(field, "must be the same for all names of a port"));
        }
    }
    Ok(ports)
}

/// Checks that a size is within the limits.
///
/// # Errors
/// When a field is not. The error names the field.
pub fn check_size(size: wire::Size) -> Result<Size, Invalid> {
    if size.cpu_cores > limit::CORES_MAX {
        return Err(Invalid::new("size.cpu_cores", "must be 1 to 64, or 0 for the snapshot's"));
    }
    if size.memory_mib != 0 && !limit::MEMORY_MIB.contains(&size.memory_mib) {
        return Err(Invalid::new(
            "size.memory_mib",
            "must be 64 to 524288, or 0 for the snapshot's",
        ));
    }
    if size.disk_gib > limit::DISK_GIB_MAX {
        return Err(Invalid::new("size.disk_gib", "must be 1 to 16384, or 0 for the snapshot's"));
    }
    Ok(size.into())
}

pub(crate) fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), Invalid> {
    if metadata.len() > limit::METADATA_MAX {
        return Err(Invalid::new("metadata", "must be at most 32 pairs"));
    }
    for (key, value) in metadata {
        let plain = key.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(&b));
        if key.is_empty() || key.len() > limit::METADATA_KEY_BYTES_MAX || !plain {
            return Err(Invalid::new(
                "metadata.key",
                "must be 1 to 63 characters of A-Z a-z 0-9 . _ - /",
            ));
        }
        if value.len() > limit::METADATA_VALUE_BYTES_MAX || value.chars().any(char::is_control) {
            return Err(Invalid::new(
                "metadata.value",
                "must be at most 1024 bytes without control characters",
            ));
        }
    }
    Ok(())
}

/// Checks an environment: names of letters, digits and underscores, values without NUL, and the
/// limits.
///
/// # Errors
/// When a variable breaks a rule, or a limit is exceeded. The error names the rule.
pub fn check_env(env: &BTreeMap<String, String>) -> Result<(), Invalid> {
    let bytes: usize = env.iter().map(|(key, value)| key.len() + value.len() + 2).sum();
    if env.len() > limit::ENV_MAX || bytes > limit::ENV_BYTES_MAX {
        return Err(Invalid::new("env", "must be at most 64 variables and 32 KiB in all"));
    }
    for (key, value) in env {
        let plain = key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if key.is_empty() || !plain || key.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(Invalid::new(
                "env.key",
                "must be letters, digits and underscores and not start with a digit",
            ));
        }
        if value.contains('\0') {
            return Err(Invalid::new("env.value", "must not hold a NUL"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> wire::CreateSandboxRequest {
        wire::CreateSandboxRequest {
            request_id: "r-1".into(),
            snapshot_id: "pvelxc_1vcpu_512mb_2gb_v1".into(),
            ..Default::default()
        }
    }

    #[track_caller]
    fn refused(field: &str, change: impl FnOnce(&mut wire::CreateSandboxRequest)) {
        let mut request = request();
        change(&mut request);
        let error = Spec::try_from(&request).expect_err(field);
        assert_eq!(error.what, field);
    }

    #[test]
    fn plain_request_is_accepted() {
        let spec = Spec::try_from(&request()).expect("valid");
        assert_eq!((spec.network, spec.node), (Network::Static, None));
    }

    #[test]
    fn spec_field_out_of_bounds_is_named() {
        refused("request_id", |r| r.request_id = String::new());
        refused("request_id", |r| r.request_id = "a\nb".into());
        refused("request_id", |r| r.request_id = "x".repeat(65));
        refused("snapshot_id", |r| r.snapshot_id = "--force".into());
        refused("size.cpu_cores", |r| {
            r.size = Some(wire::Size { cpu_cores: 65, memory_mib: 0, disk_gib: 0 })
        });
        let disk = wire::Size { disk_gib: 16_385, ..wire::Size::default() };
        refused("size.disk_gib", |r| r.size = Some(disk));
        refused("size.memory_mib", |r| {
            r.size = Some(wire::Size { cpu_cores: 1, memory_mib: 63, disk_gib: 0 })
        });
        refused("metadata.key", |r| drop(r.metadata.insert("a b".into(), String::new())));
        refused("metadata.value", |r| drop(r.metadata.insert("a".into(), "x\ny".into())));
        refused("env.key", |r| drop(r.env.insert("A=B".into(), String::new())));
        refused("env.value", |r| drop(r.env.insert("A".into(), "\0".into())));
        refused("env", |r| drop(r.env.insert("A".into(), "x".repeat(40_000))));
        refused("network", |r| r.network = 9);
        refused("egress", |r| r.egress = 9);
        refused("egress_names", |r| r.egress = wire::Egress::Allow.into());
        refused("egress_names", |r| r.egress_names.push("github.com".into()));
        refused("node", |r| r.node = "a/../b".into());
        let placement = |r: &mut wire::CreateSandboxRequest, labels: Vec<String>| {
            r.placement = Some(wire::Placement { avoid: labels, ..Default::default() });
        };
        refused("placement.avoid[1]", |r| placement(r, vec!["a".into(), "a b".into()]));
        refused("placement.avoid", |r| placement(r, vec!["a".into(); 9]));
        refused("services[0].port", |r| {
            r.services.push(wire::HttpService { port: 0, ..Default::default() })
        });
        let service = |visibility| wire::HttpService { port: 80, visibility, ..Default::default() };
        refused("services[0].visibility", |r| r.services.push(service(9)));
        refused("services[1].visibility", |r| {
            let other = wire::HttpService { name: "b".into(), ..service(2) };
            r.services = vec![service(1), other];
        });
        refused("services[0].name", |r| {
            r.services =
                vec![wire::HttpService { name: "A".into(), port: 80, ..Default::default() }];
        });
    }
}
