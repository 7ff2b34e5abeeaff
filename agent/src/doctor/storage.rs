//! Judges storages and templates. Pure.

use daemon::doctor::{Check, State};

use super::facts::{Node, Storage, Template, TemplateLine, TemplateState};
use crate::{config::Config, detect};

/// Command after which the agent that runs offers a new template.
const RESTART: &str = "systemctl restart pve-sandbox-agent";

pub(super) fn check(config: &Config, node: &Node) -> Vec<Check> {
    if node.storages.is_empty() {
        return vec![undecided(&node.fit_storages)];
    }
    let of_one = |storage: &Storage| {
        let check = one(config, storage, node);
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

/// Judges a node that has no template, and no storage for the first one: none is fit, or nobody can tell which of them.
fn undecided(fit: &[String]) -> Check {
    let found = match fit {
        [] => "no storage of this node both holds containers and supports linked clones".to_owned(),
        fit => format!("several are fit for new templates, and none is named: {}", fit.join(", ")),
    };
    Check::failed("storage", "storage.cfg", found, detect::storage_remedy(fit))
}

fn one(config: &Config, storage: &Storage, node: &Node) -> Check {
    let name = &storage.name;
    let is_named = config.storage.as_ref().is_some_and(|storage| storage.value == *name);
    let instead = instead(name, is_named, &node.fit_storages, &node.templates);
    let failed = |found: String, remedy: String| Check::failed("storage", name, found, remedy);
    let Some(kind) = &storage.kind else {
        let here = &config.node.value;
        return failed(format!("{here} has no storage of this name"), instead);
    };
    if !storage.links_clones {
        return failed(format!("type {kind} does not support linked clones"), instead);
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

/// Says how sandboxes get another storage than this one. A template stays where it is, and so do its clones: another one of
/// its snapshot takes its place, and the agent leaves it alone once nothing names it to the agent. `is_named`: new
/// templates go to this storage, unless they are told another.
fn instead(name: &str, is_named: bool, fit: &[String], templates: &[Template]) -> String {
    let mut steps = Vec::new();
    let other = fit.iter().find(|other| *other != name).map(String::as_str);
    let other = other.unwrap_or_else(|| {
        steps.push("pvesm add zfspool NAME --pool POOL --content rootdir,images".to_owned());
        "NAME"
    });
    let is_on_it = |template: &&Template| match &template.state {
        TemplateState::Fit(storage) => storage.as_deref() == Some(name),
        TemplateState::Missing
        | TemplateState::Ordinary
        | TemplateState::Forbidden(..)
        | TemplateState::Unreadable(_) => false,
    };
    let on_it: Vec<_> = templates.iter().filter(is_on_it).collect();
    for Template { snapshot, vmid, in_file, mark, .. } in &on_it {
        let init = "pve-sandbox-agent template init";
        steps.push(format!("{init} --snapshot {snapshot} --storage {other}"));
        match mark {
            TemplateLine::Missing => {}
            TemplateLine::Alone => steps.push(format!("pct set {vmid} --delete description")),
            TemplateLine::AmongOthers => {
                steps
                    .push(format!("take the line pve-sandbox-template out of the notes of {vmid}"));
            }
        }
        if *in_file {
            let edit = "put the new number into its [[template]] in agent.toml, or take that out";
            steps.push(format!("{edit} (vmid = {vmid})"));
        }
    }
    if is_named {
        steps.push(format!("set storage = \"{other}\" in agent.toml"));
    }
    if !on_it.is_empty() {
        steps.push(RESTART.to_owned());
    }
    steps.join("; ")
}

pub(super) fn templates(config: &Config, templates: &[Template]) -> Vec<Check> {
    let mut checks: Vec<_> = templates.iter().map(|one| template(config, one)).collect();
    if !checks.iter().any(|check| check.state == State::Ok) {
        let found = "no snapshot is offered: no sandbox can be made on this node";
        let remedy = format!("pve-sandbox-agent template init; {RESTART}");
        checks.push(Check::failed("template", "", found, remedy));
    }
    checks
}

fn template(config: &Config, template: &Template) -> Check {
    let Template { snapshot, vmid, path, state, .. } = template;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn template(vmid: u32, storage: &str, in_file: bool, mark: TemplateLine) -> Template {
        Template {
            snapshot: "debian".parse().expect("valid"),
            vmid: vmid.try_into().expect("in range"),
            path: "/x".into(),
            state: TemplateState::Fit(Some(storage.to_owned())),
            in_file,
            mark,
        }
    }

    #[test]
    fn several_fit_storages_are_named_and_none_is_told_from_them() {
        let several = undecided(&["a".to_owned(), "b".to_owned()]);
        assert_eq!(several.found, "several are fit for new templates, and none is named: a, b");
        assert!(several.remedy.is_some_and(|remedy| remedy.starts_with("set storage = \"a\"")));
        let none = undecided(&[]);
        assert!(none.found.starts_with("no storage of this node"), "{none:?}");
        assert!(none.remedy.is_some_and(|remedy| remedy.contains("pvesm set STORAGE")));
    }

    #[test]
    fn another_template_takes_the_place_of_one_on_an_unfit_storage() {
        let fit = ["fast".to_owned(), "spare".to_owned()];
        let elsewhere = template(9001, "spare", false, TemplateLine::Alone);
        let init = "pve-sandbox-agent template init --snapshot debian --storage spare; ";
        for (in_file, mark, steps) in [
            (false, TemplateLine::Alone, "pct set 9000 --delete description; "),
            (
                false,
                TemplateLine::AmongOthers,
                "take the line pve-sandbox-template out of the notes of 9000; ",
            ),
            (
                true,
                TemplateLine::Missing,
                "put the new number into its [[template]] in agent.toml, or take that out (vmid = 9000); ",
            ),
        ] {
            let templates = [template(9000, "fast", in_file, mark), elsewhere.clone()];
            let told = instead("fast", false, &fit, &templates);
            assert_eq!(told, format!("{init}{steps}{RESTART}"), "{mark:?}");
        }
        let told = instead("fast", true, &fit, std::slice::from_ref(&elsewhere));
        assert_eq!(told, "set storage = \"spare\" in agent.toml", "no template is on it");
        let told = instead("fast", true, &fit[..1], &[]);
        assert!(told.starts_with("pvesm add zfspool NAME ") && told.contains("\"NAME\""), "{told}");
    }
}
