//! Checked change of a sandbox. The controller checks it early, the node applies it.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    id::Invalid,
    lifetime::{Action, LifetimePatch},
    name::SandboxName,
    sandbox::v1 as wire,
    spec::{Egress, Size, check_metadata, check_size},
};

/// Fields that can change, as the error of a wrong mask lists them.
const FIELDS: &str = "must name fields of: name, metadata, metadata.KEY, lifetime, lifetime.ttl, \
    lifetime.ttl_action, lifetime.idle, lifetime.idle_action, lifetime.idle_cpu, wake_on, \
    wake_on.http, wake_on.ssh, wake_on.exec, egress, size, size.cpu_cores, size.memory_mib, size.disk_gib";

/// Change of a sandbox's fields. What is `None` stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Update {
    /// Name; `Some(None)` removes it.
    pub name: Option<Option<SandboxName>>,
    /// All metadata, in place of what there is.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Single pairs, changed after `metadata`; `None` removes a pair.
    pub pairs: BTreeMap<String, Option<String>>,
    /// Lifetime rules.
    pub lifetime: LifetimePatch,
    /// Events that wake it.
    pub wake_on: WakeOnPatch,
    /// Reach of a sandbox outside of itself; `Some(None)`: the default.
    pub egress: Option<Option<Egress>>,
    /// Size, alone in its update; a field that is 0 stays as it is.
    pub size: Option<Size>,
    /// Revision that the sandbox must have.
    pub revision: Option<u64>,
}

/// Change of the events that wake a sandbox. What is `None` stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WakeOnPatch {
    /// HTTP request.
    pub http: Option<bool>,
    /// SSH connection.
    pub ssh: Option<bool>,
    /// Command, or access to files.
    pub exec: Option<bool>,
}

/// Builds the request that sets `fields` of a sandbox to the values in `sandbox`.
pub fn request(sandbox: wire::Sandbox, fields: &[&str]) -> wire::UpdateSandboxRequest {
    let paths = fields.iter().map(ToString::to_string).collect();
    let update_mask = Some(prost_types::FieldMask { paths });
    wire::UpdateSandboxRequest { sandbox: Some(sandbox), update_mask, revision: 0 }
}

impl Update {
    /// Returns the metadata that `before` becomes.
    ///
    /// # Errors
    /// When there would be too many pairs, or one of them breaks a rule.
    pub fn metadata_of(
        &self,
        before: &BTreeMap<String, String>,
    ) -> Result<BTreeMap<String, String>, Invalid> {
        let mut metadata = self.metadata.as_ref().unwrap_or(before).clone();
        for (key, value) in &self.pairs {
            match value {
                Some(value) => drop(metadata.insert(key.clone(), value.clone())),
                None => drop(metadata.remove(key)),
            }
        }
        check_metadata(&metadata)?;
        Ok(metadata)
    }
}

impl TryFrom<&wire::UpdateSandboxRequest> for Update {
    type Error = Invalid;

    fn try_from(request: &wire::UpdateSandboxRequest) -> Result<Self, Invalid> {
        let paths = request.update_mask.as_ref().map_or(&[][..], |mask| &mask.paths);
        if paths.is_empty() {
            return Err(Invalid::new("update_mask", "must name at least one field"));
        }
        let nothing = wire::Sandbox::default();
        let sandbox = request.sandbox.as_ref().unwrap_or(&nothing);
        let asked = sandbox.lifetime.unwrap_or_default();
        let (rules, wake_on) =
            (LifetimePatch::try_from(&asked)?, sandbox.wake_on.unwrap_or_default());
        let mut update = Self::default();
        for path in paths {
            let lifetime = &mut update.lifetime;
            match path.as_str() {
                "name" => {
                    let name = (!sandbox.name.is_empty()).then(|| sandbox.name.parse());
                    update.name = Some(name.transpose()?);
                }
                "metadata" => update.metadata = Some(sandbox.metadata.clone()),
                "lifetime" => {
                    *lifetime = LifetimePatch {
                        ttl: rules.ttl.or(Some(Duration::ZERO)),
                        ttl_action: rules.ttl_action.or(Some(Action::default())),
                        idle: rules.idle.or(Some(Duration::ZERO)),
                        idle_action: rules.idle_action.or(Some(Action::default())),
                        idle_cpu: rules.idle_cpu.or(Some(0)),
                    }
                }
                "lifetime.ttl" => lifetime.ttl = rules.ttl.or(Some(Duration::ZERO)),
                "lifetime.ttl_action" => {
                    lifetime.ttl_action = rules.ttl_action.or(Some(Action::default()));
                }
                "lifetime.idle" => lifetime.idle = rules.idle.or(Some(Duration::ZERO)),
                "lifetime.idle_action" => {
                    lifetime.idle_action = rules.idle_action.or(Some(Action::default()));
                }
                "lifetime.idle_cpu" => lifetime.idle_cpu = rules.idle_cpu.or(Some(0)),
                "wake_on" => {
                    let wire::WakeOn { http, ssh, exec } = wake_on;
                    let (http, ssh, exec) = (Some(http), Some(ssh), Some(exec));
                    update.wake_on = WakeOnPatch { http, ssh, exec };
                }
                "wake_on.http" => update.wake_on.http = Some(wake_on.http),
                "wake_on.ssh" => update.wake_on.ssh = Some(wake_on.ssh),
                "wake_on.exec" => update.wake_on.exec = Some(wake_on.exec),
                "egress" => {
                    let (value, names) = (sandbox.egress, &sandbox.egress_names);
                    update.egress = Some(Egress::read(value, names, "sandbox.egress")?);
                }
                "size" | "size.cpu_cores" | "size.memory_mib" | "size.disk_gib" => {
                    update.size = Some(size_of(&update, path, sandbox)?);
                }
                path => match path.strip_prefix("metadata.") {
                    // A key may hold dots; back quotes around it are allowed, as in AIP-161.
                    Some(key) => {
                        let quoted = key.strip_prefix('`').and_then(|key| key.strip_suffix('`'));
                        let key = quoted.unwrap_or(key);
                        let value = sandbox.metadata.get(key).cloned();
                        update.pairs.insert(key.to_owned(), value);
                    }
                    None => return Err(Invalid::new("update_mask", FIELDS)),
                },
            }
        }
        if update.size.is_some() && (Self { size: None, ..update.clone() }) != Self::default() {
            let why = "must name no other field beside those of size: it changes the container";
            return Err(Invalid::new("update_mask", why));
        }
        update.revision = (request.revision > 0).then_some(request.revision);
        // What the pairs alone break; how many there are in the end, only the node knows.
        update.metadata_of(&BTreeMap::new())?;
        Ok(update)
    }
}

/// Adds to the size that is asked for what `path` names.
fn size_of(update: &Update, path: &str, sandbox: &wire::Sandbox) -> Result<Size, Invalid> {
    let size = check_size(sandbox.size.unwrap_or_default());
    let size = size.map_err(|invalid| invalid.under("sandbox"))?;
    let named = match path {
        "size.cpu_cores" => Size { cpu_cores: size.cpu_cores, ..Size::default() },
        "size.memory_mib" => Size { memory_mib: size.memory_mib, ..Size::default() },
        "size.disk_gib" => Size { disk_gib: size.disk_gib, ..Size::default() },
        _ => size,
    };
    if named == Size::default() {
        return Err(Invalid::new(format!("sandbox.{path}"), "must be given, and not be 0"));
    }
    Ok(named.or(update.size.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox() -> wire::Sandbox {
        wire::Sandbox {
            name: "box-1".into(),
            metadata: [("a".into(), "1".into()), ("b.c".into(), "2".into())].into(),
            lifetime: Some(wire::Lifetime {
                ttl: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
                ..wire::Lifetime::default()
            }),
            wake_on: Some(wire::WakeOn { http: true, ..wire::WakeOn::default() }),
            size: Some(wire::Size { memory_mib: 512, ..wire::Size::default() }),
            ..wire::Sandbox::default()
        }
    }

    fn update(paths: &[&str]) -> Update {
        Update::try_from(&request(sandbox(), paths)).expect("valid")
    }

    #[test]
    fn only_masked_fields_change() {
        let named = Update { name: Some("box-1".parse().ok()), ..Update::default() };
        assert_eq!(update(&["name"]), named);
        assert_eq!(update(&["metadata"]).metadata, Some(sandbox().metadata));
        let ttl = update(&["lifetime.ttl"]).lifetime;
        assert_eq!(ttl, LifetimePatch { ttl: Some(Duration::from_secs(60)), ..Default::default() });
        let all = update(&["lifetime"]).lifetime;
        assert_eq!((all.idle, all.ttl_action), (Some(Duration::ZERO), Some(Action::Pause)));
        assert_eq!(
            (all.idle_cpu, update(&["lifetime.idle_cpu"]).lifetime.idle_cpu),
            (Some(0), Some(0))
        );
        let http = WakeOnPatch { http: Some(true), ..WakeOnPatch::default() };
        assert_eq!(update(&["wake_on.http"]).wake_on, http);
        assert_eq!(update(&["wake_on"]).wake_on.ssh, Some(false));
        let bare = Update::try_from(&request(wire::Sandbox::default(), &["name"]));
        assert_eq!(bare.expect("valid").name, Some(None), "it is removed");
    }

    #[test]
    fn size_changes_alone_and_only_where_it_is_given() {
        let memory = Size { memory_mib: 512, ..Size::default() };
        assert_eq!(update(&["size"]).size, Some(memory));
        assert_eq!(update(&["size.memory_mib"]).size, Some(memory));
        for (paths, field) in [
            (&["size", "name"][..], "update_mask"),
            (&["metadata.a", "size.memory_mib"], "update_mask"),
            (&["size.disk_gib"], "sandbox.size.disk_gib"),
        ] {
            let error = Update::try_from(&request(sandbox(), paths)).expect_err(field);
            assert_eq!(error.what, field, "{paths:?}");
        }
        let tiny = wire::Size { memory_mib: 1, ..wire::Size::default() };
        let tiny = wire::Sandbox { size: Some(tiny), ..sandbox() };
        let error = Update::try_from(&request(tiny, &["size"])).expect_err("too small");
        assert_eq!(error.what, "sandbox.size.memory_mib");
        Update::try_from(&request(wire::Sandbox::default(), &["size"])).expect_err("no size");
    }

    #[test]
    fn pairs_of_metadata_are_set_and_removed_by_key() {
        let before = [("a".to_owned(), "0".to_owned()), ("z".to_owned(), "9".to_owned())].into();
        let of = |paths: &[&str]| update(paths).metadata_of(&before).expect("valid");
        let pairs = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
        };
        assert_eq!(of(&["name"]), before);
        assert_eq!(
            of(&["metadata.a", "metadata.b.c"]),
            pairs(&[("a", "1"), ("b.c", "2"), ("z", "9")])
        );
        assert_eq!(of(&["metadata.`b.c`", "metadata.z"]), pairs(&[("a", "0"), ("b.c", "2")]));
        assert_eq!(of(&["metadata"]), pairs(&[("a", "1"), ("b.c", "2")]));
        let full = (0..32).map(|n| (format!("k{n}"), String::new())).collect();
        update(&["metadata.a"]).metadata_of(&full).expect_err("33 pairs");
    }

    #[test]
    fn wrong_mask_or_value_is_refused() {
        let refused = |field: &str, paths: &[&str], sandbox| {
            let error = Update::try_from(&request(sandbox, paths)).expect_err(field);
            assert_eq!(error.what, field, "{paths:?}");
        };
        for path in ["", "*", "id", "phase", "size.swap", "lifetime.", "metadat", "name.x"] {
            refused("update_mask", &[path], sandbox());
        }
        refused("update_mask", &[], sandbox());
        refused("name", &["name"], wire::Sandbox { name: "100".into(), ..sandbox() });
        let bad = [("a b".to_owned(), String::new())].into();
        refused("metadata.key", &["metadata.a b"], wire::Sandbox { metadata: bad, ..sandbox() });
    }
}
