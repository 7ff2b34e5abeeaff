//! Judges storages and templates. Pure.

use daemon::doctor::{Check, State};

use super::facts::{Node, Storage, Template, TemplateState};
use crate::config::Config;

pub(super) fn check(config: &Config, node: &Node) -> Vec<Check> {
    if node.storages.is_empty() {
        let remedy = "add rootdir to the content of a storage: pvesm set STORAGE --content ...,rootdir; or set storage in \
                      agent.toml";
        let found = "no storage holds containers of this node";
        return vec![Check::failed("storage", "storage.cfg", found, remedy)];
    }
    let of_one = |storage: &Storage| {
        let check = one(config, storage, &node.fit_storages);
        match check.state {
            // Sandboxes are made elsewhere; only `template init` would choose it.
            State::Failed if !storage.has_template => Check {
                state: State::Warning,
                found: format!("{}; no template is on it", check.found),
                ..check
            },
            State::Failed | State::Warning | State::Ok => check,
        }
    };
    node.storages.iter().map(of_one).collect()
}

fn one(config: &Config, storage: &Storage, fit: &[String]) -> Check {
    let name = &storage.name;
    let others: Vec<_> = fit.iter().filter(|other| *other != name).map(String::as_str).collect();
    let instead = match others.first() {
        Some(other) => format!("pve-sandbox-agent template init --storage {other}"),
        None => "pvesm add zfspool NAME --pool POOL --content rootdir,images; then: \
                 pve-sandbox-agent template init --storage NAME"
            .to_owned(),
    };
    let failed = |found: String, remedy: String| Check::failed("storage", name, found, remedy);
    let Some(kind) = &storage.kind else {
        let node = &config.node.value;
        return failed(format!("{node} has no storage of this name"), instead);
    };
    if !storage.links_clones {
        return failed(format!("type {kind} clones no template linked"), instead);
    }
    if !storage.holds_containers {
        let found = "it does not hold containers of this node, or is disabled".to_owned();
        let remedy = format!(
            "see {name} in storage.cfg: `rootdir` must be in its content, this node in its nodes, \
             and it must not be disabled"
        );
        return failed(found, remedy);
    }
    match storage.is_active {
        Some(true) => Check::ok("storage", name, format!("type {kind}, active")),
        Some(false) => failed(
            "PVE says that it is not active".to_owned(),
            format!("pvesm status --storage {name}; mend what it says"),
        ),
        None => Check::warning(
            "storage",
            name,
            "PVE does not say whether it is active",
            format!("pvesm status --storage {name}"),
        ),
    }
}

pub(super) fn templates(config: &Config, templates: &[Template]) -> Vec<Check> {
    let mut checks: Vec<_> = templates.iter().map(|one| template(config, one)).collect();
    if !checks.iter().any(|check| check.state == State::Ok) {
        let found = "no snapshot is offered: no sandbox can be made on this node";
        checks.push(Check::failed("template", "", found, "pve-sandbox-agent template init"));
    }
    checks
}

fn template(config: &Config, template: &Template) -> Check {
    let Template { snapshot, vmid, path, state } = template;
    let subject = format!("{snapshot}, {vmid}");
    let not_offered = |found: &str, remedy: String| {
        let found = format!("the snapshot is not offered: its template {found}");
        Check::warning("template", subject.clone(), found, remedy)
    };
    match state {
        TemplateState::Fit(storage) => {
            let storage = storage.as_deref().unwrap_or("an unknown storage");
            Check::ok("template", subject, format!("sandboxes are cloned from it, on {storage}"))
        }
        TemplateState::Missing => {
            let node = &config.node.value;
            let remedy = format!(
                "pve-sandbox-agent template init --vmid {vmid} --snapshot {snapshot}; or take it out of \
                 agent.toml"
            );
            not_offered(&format!("is missing on {node}"), remedy)
        }
        TemplateState::Ordinary => {
            let remedy = format!(
                "set the right vmid in agent.toml; only if {vmid} is meant to be a template: pct template {vmid} \
                 (cannot be undone)"
            );
            not_offered("is an ordinary container", remedy)
        }
        TemplateState::Forbidden(keys, text) => {
            let (raw, settable): (Vec<_>, Vec<_>) =
                keys.iter().map(String::as_str).partition(|key| key.starts_with("lxc."));
            let (path, settable) = (path.display(), settable.join(","));
            let remedy = match (raw.is_empty(), settable.as_str()) {
                (_, keys) if keys.contains("unprivileged") => {
                    "convert it: docs/templates.md says how".to_owned()
                }
                (true, keys) => format!("pct set {vmid} --delete {keys}"),
                (false, "") => format!("take the lines `lxc.` out of {path}"),
                (false, keys) => {
                    format!("take the lines `lxc.` out of {path}; pct set {vmid} --delete {keys}")
                }
            };
            not_offered(text, remedy)
        }
        TemplateState::Unreadable(why) => {
            let path = path.display().to_string();
            Check::warning("template", path.clone(), why.clone(), format!("ls -l {path}"))
        }
    }
}
