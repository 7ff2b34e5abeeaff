//! The fault plan: what goes wrong, where, and how often.
//!
//! `faults.json` in the control directory is a list of [`Rule`]s. Each command reports its steps;
//! the first rule that fits a step is applied and its count drops by one. Both happen under one
//! flock, so that of several callers exactly one meets a fault with `times: 1`.
//!
//! Steps, in order; each has a side before and one after. Those in parentheses are single points:
//!
//! | command | steps |
//! |---|---|
//! | all | (`begin`) ... (`end`) |
//! | clone | create-conf, lock-source, write-conf, volume, write-rootfs, mount with (mounted) in it, unlock-target, unlock-source |
//! | create | create-conf, volume, extract, write |
//! | start | lock, write-config, lxc-start, (running) |
//! | stop, shutdown | lock, lxc-stop, (stopped) |
//! | reboot | those of shutdown, then those of start |
//! | destroy | lock, stop, volume, conf |
//! | set | lock, write |
//! | resize | volume, write |
//! | unlock | write |
//! | template | volume, write |
//! | snapshot | prepare with lock in it, volume, write |
//! | rollback, delsnapshot | lock, volume (rollback) |
//! | push, pull | copy |
//! | exec | (attach) |
//!
//! `begin`, `end` and the steps before `volume` in a clone happen in the parent, the rest in the
//! worker. A step that a signal interrupts is undone as the real `pct` undoes it: what `volume` has
//! created by then stays as an orphan.

pub(crate) mod act;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

/// Effect of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Waits for ever, or until a signal comes.
    Hang,
    /// Waits for `ms`.
    SleepMs,
    /// Fails with `message` and exits with `code`. At the step `end` the work is done and only the
    /// exit code is wrong.
    Exit,
    /// Sends SIGKILL to the whole command right before the step.
    DieBefore,
    /// Sends SIGKILL to the whole command right after the step.
    DieAfter,
    /// Sends SIGKILL to the worker only.
    KillWorker,
    /// Sends SIGKILL to the parent only: the worker continues.
    KillParent,
    /// Leaves the locks in the configuration files at the end.
    LeaveLock,
    /// Prints `message` on stderr and continues.
    Stderr,
}

/// Side of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// Before the step begins.
    Before,
    /// After the step's effect, before anything is recorded about it.
    After,
}

/// One planned fault. Absent fields match everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Sub-command; `*` matches any.
    pub command: String,
    /// Container; for a clone, the new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmid: Option<u32>,
    /// Source of a clone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<u32>,
    /// Step; without one, the first step, `begin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// Side of the step; implied by `die_before` and `die_after`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<When>,
    /// Effect of the fault.
    pub action: Action,
    /// Duration in milliseconds, for `sleep_ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ms: Option<u64>,
    /// Exit code, for `exit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<u8>,
    /// Text, for `exit` and `stderr`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Number of times that the rule applies; without one, always.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<u32>,
}

impl Rule {
    /// Creates a rule that applies once, at a step of a command.
    #[must_use]
    pub fn once(command: &str, step: &str, action: Action) -> Self {
        Self {
            command: command.to_owned(),
            vmid: None,
            template: None,
            step: Some(step.to_owned()),
            when: None,
            action,
            ms: None,
            code: None,
            message: None,
            times: Some(1),
        }
    }

    /// Restricts the rule to one container.
    #[must_use]
    pub fn for_vmid(mut self, vmid: u32) -> Self {
        self.vmid = Some(vmid);
        self
    }

    /// Moves the fault behind the step.
    #[must_use]
    pub fn after(mut self) -> Self {
        self.when = Some(When::After);
        self
    }

    /// Sets the duration.
    #[must_use]
    pub fn lasting_ms(mut self, ms: u64) -> Self {
        self.ms = Some(ms);
        self
    }

    /// Sets the exit code and the message.
    #[must_use]
    pub fn saying(mut self, code: u8, message: &str) -> Self {
        self.code = Some(code);
        self.message = Some(message.to_owned());
        self
    }

    /// Makes the rule apply every time.
    #[must_use]
    pub fn always(mut self) -> Self {
        self.times = None;
        self
    }

    fn fits(&self, point: &Point<'_>) -> bool {
        let when = match self.action {
            Action::DieBefore => When::Before,
            Action::DieAfter => When::After,
            Action::Hang
            | Action::SleepMs
            | Action::Exit
            | Action::KillWorker
            | Action::KillParent
            | Action::LeaveLock
            | Action::Stderr => self.when.unwrap_or(When::Before),
        };
        (self.command == "*" || self.command == point.command)
            && self.vmid.is_none_or(|vmid| Some(vmid) == point.vmid)
            && self.template.is_none_or(|vmid| Some(vmid) == point.template)
            && self.step.as_deref().unwrap_or("begin") == point.step
            && when == point.when
            && self.times != Some(0)
    }
}

/// Position of a command: its subject and its step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Point<'a> {
    pub(crate) command: &'a str,
    pub(crate) vmid: Option<u32>,
    pub(crate) template: Option<u32>,
    pub(crate) step: &'a str,
    pub(crate) when: When,
}

fn plan_path(control_dir: &Path) -> PathBuf {
    control_dir.join("faults.json")
}

fn locked(control_dir: &Path) -> io::Result<File> {
    let file = File::create(control_dir.join("faults.lock"))?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

/// Writes a plan and replaces an older one.
pub fn write_plan(control_dir: &Path, rules: &[Rule]) -> io::Result<()> {
    fs::create_dir_all(control_dir)?;
    let _lock = locked(control_dir)?;
    store(control_dir, rules)
}

/// Reads the rest of the plan that is still unused.
pub fn read_plan(control_dir: &Path) -> io::Result<Vec<Rule>> {
    match fs::read(plan_path(control_dir)) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

pub fn clear_plan(control_dir: &Path) -> io::Result<()> {
    write_plan(control_dir, &[])
}

fn store(control_dir: &Path, rules: &[Rule]) -> io::Result<()> {
    let path = plan_path(control_dir);
    if rules.is_empty() {
        return match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        };
    }
    let tmp = path.with_extension(format!("tmp.{}", std::process::id()));
    fs::write(&tmp, serde_json::to_vec_pretty(rules)?)?;
    fs::rename(tmp, path)
}

/// Takes the fault for this point and lowers its count by one. An unreadable plan is an error: a
/// test whose plan has a typing mistake must not pass.
pub(crate) fn take(control_dir: &Path, point: &Point<'_>) -> io::Result<Option<Rule>> {
    if !plan_path(control_dir).exists() {
        return Ok(None);
    }
    let _lock = locked(control_dir)?;
    let mut rules = read_plan(control_dir)?;
    let Some(index) = rules.iter().position(|rule| rule.fits(point)) else { return Ok(None) };
    let rule = rules[index].clone();
    if let Some(times) = rule.times {
        if times <= 1 {
            rules.remove(index);
        } else {
            rules[index].times = Some(times - 1);
        }
        store(control_dir, &rules)?;
    }
    Ok(Some(rule))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at<'a>(step: &'a str, when: When) -> Point<'a> {
        Point { command: "clone", vmid: Some(101), template: Some(900), step, when }
    }

    #[test]
    fn rules_are_used_up_in_order_where_they_fit() {
        let dir = tempfile::tempdir().unwrap();
        let rules = [
            Rule::once("clone", "volume", Action::DieAfter).for_vmid(101),
            Rule::once("start", "begin", Action::Hang),
            Rule::once("clone", "begin", Action::Stderr).saying(0, "noise").always(),
        ];
        write_plan(dir.path(), &rules).unwrap();
        let take = |point: &Point<'_>| take(dir.path(), point).unwrap().map(|r| r.action);
        assert_eq!(take(&at("volume", When::Before)), None);
        assert_eq!(take(&at("volume", When::After)), Some(Action::DieAfter));
        assert_eq!(take(&at("volume", When::After)), None);
        for _ in 0..3 {
            assert_eq!(take(&at("begin", When::Before)), Some(Action::Stderr));
        }
        assert_eq!(read_plan(dir.path()).unwrap().len(), 2);
        clear_plan(dir.path()).unwrap();
        assert_eq!(take(&at("begin", When::Before)), None);
    }

    #[test]
    fn fault_plan_is_parsed() {
        let text = r#"[{"command":"clone","action":"sleep_ms","ms":5,"step":"volume"}]"#;
        let rules: Vec<Rule> = serde_json::from_str(text).unwrap();
        assert_eq!(
            (rules[0].action, rules[0].ms, rules[0].times),
            (Action::SleepMs, Some(5), None)
        );
        let typo = r#"[{"command":"clone","action":"hang","stepp":"volume"}]"#;
        assert!(serde_json::from_str::<Vec<Rule>>(typo).is_err());
    }
}
