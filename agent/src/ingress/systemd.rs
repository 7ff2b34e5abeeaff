//! Services of Caddy under systemd.

use std::{ffi::OsString, io, path::PathBuf, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    low_ports,
    switch::{Colour, Run, Service},
};
use crate::{
    clock::Clock,
    run::{Exit, Program, Runner},
    sys::proc,
};

/// Path of the program.
const SYSTEMCTL: &str = "/usr/bin/systemctl";
/// Directory that is there while systemd runs this machine.
const RUNNING: &str = "/run/systemd/system";
/// Directory of units and drop-ins that are made on this machine.
pub const UNITS: &str = "/etc/systemd/system";
/// Longest answer to a question.
const QUESTION: Duration = Duration::from_secs(10);
/// Longest start or stop: longer than the limits in the unit.
const CHANGE: Duration = Duration::from_secs(60);
/// Ticks of the kernel's clock for processes, milliseconds each (USER_HZ, proc(5)).
const TICK_MS: u64 = 10;

/// Services that run Caddy. Where there are none, somebody else starts Caddy.
#[async_trait::async_trait]
pub trait Services: Send + Sync + std::fmt::Debug {
    /// Returns the state of a service.
    async fn state(&self, colour: Colour) -> io::Result<Service>;

    /// Returns whether a boot starts Caddy.
    async fn is_enabled(&self) -> io::Result<bool>;

    /// Starts a service; returns once its Caddy accepts connections.
    async fn start(&self, colour: Colour) -> io::Result<()>;

    /// Stops a service; returns once its Caddy has answered what it had accepted.
    async fn stop(&self, colour: Colour) -> io::Result<()>;

    /// Lets services that start from now on listen on ports below 1024, or takes that from them.
    async fn permit_low_ports(&self, allow: bool) -> io::Result<()>;
}

/// systemd of this machine.
#[derive(Debug)]
pub struct Systemd {
    program: PathBuf,
    units: PathBuf,
    runner: Runner,
    proc: PathBuf,
    clock: Arc<dyn Clock>,
}

impl Systemd {
    /// Returns the systemd of this machine; `None` where another program is pid 1.
    pub fn of_host(runner: Runner, proc: PathBuf, clock: Arc<dyn Clock>) -> Option<Self> {
        let program = PathBuf::from(SYSTEMCTL);
        let runs = std::path::Path::new(RUNNING).is_dir() && program.exists();
        runs.then_some(Self { program, units: UNITS.into(), runner, proc, clock })
    }

    async fn call(&self, words: &[&str], limit: Duration) -> io::Result<String> {
        let arguments = words.iter().map(OsString::from).collect();
        let program = Program { path: self.program.clone(), arguments };
        let finished = self.runner.run(program, Instant::now() + limit).await;
        let finished = finished.map_err(io::Error::other)?;
        match finished.exit {
            Exit::Code(0) => Ok(finished.stdout),
            Exit::Code(_) | Exit::Signal(_) => {
                let why = finished.stderr.trim().to_owned();
                Err(io::Error::other(format!("systemctl {}: {why}", words.join(" "))))
            }
        }
    }

    /// Returns whether systemd has not read the present files of a unit of Caddy.
    async fn needs_reload(&self) -> io::Result<bool> {
        let [blue, green] = Colour::ALL.map(Colour::unit);
        let told =
            self.call(&["show", "--property=NeedDaemonReload", blue, green], QUESTION).await?;
        Ok(told.lines().any(|line| line.trim() == "NeedDaemonReload=yes"))
    }

    /// Returns the start of a process, milliseconds since 1970.
    fn started_ms(&self, pid: u32) -> Option<u64> {
        let now = self.clock.moment();
        let up_ms = proc::kin(&self.proc, pid)?.start * TICK_MS;
        Some(now.wall_ms.saturating_sub(now.up_ms.saturating_sub(up_ms)))
    }
}

#[async_trait::async_trait]
impl Services for Systemd {
    async fn state(&self, colour: Colour) -> io::Result<Service> {
        let properties = "--property=ActiveState,MainPID,InvocationID";
        let told = self.call(&["show", properties, colour.unit()], QUESTION).await?;
        let value = |name: &str| {
            let mut lines = told.lines().filter_map(|line| line.split_once('='));
            lines.find(|(key, _)| *key == name).map_or("", |(_, value)| value)
        };
        let run = || {
            let started_ms = self.started_ms(value("MainPID").parse().ok()?)?;
            Some(Run { invocation: value("InvocationID").to_owned(), started_ms })
        };
        Ok(match value("ActiveState") {
            // A process that is gone: systemd is about to see it.
            "active" => run().map_or(Service::Busy, Service::On),
            "inactive" | "failed" | "" => Service::Off,
            _ => Service::Busy,
        })
    }

    async fn is_enabled(&self) -> io::Result<bool> {
        let words = ["show", "--property=UnitFileState", Colour::Blue.unit()];
        let told = self.call(&words, QUESTION).await?;
        Ok(told
            .trim()
            .strip_prefix("UnitFileState=")
            .is_some_and(|state| state.starts_with("enabled")))
    }

    async fn start(&self, colour: Colour) -> io::Result<()> {
        self.call(&["start", colour.unit()], CHANGE).await.map(drop)
    }

    async fn stop(&self, colour: Colour) -> io::Result<()> {
        self.call(&["stop", colour.unit()], CHANGE).await.map(drop)
    }

    async fn permit_low_ports(&self, allow: bool) -> io::Result<()> {
        // Also when an agent that was killed has changed them, and systemd has not read them since.
        let has_changed = low_ports::arrange(&self.units, allow)?;
        if !has_changed && !self.needs_reload().await? {
            return Ok(());
        }
        let reloaded = self.call(&["daemon-reload"], CHANGE).await;
        if reloaded.is_err() && has_changed {
            // The next call finds that there is something to do.
            low_ports::arrange(&self.units, !allow)?;
        }
        reloaded.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, path::Path};

    use super::*;
    use crate::clock::SystemClock;

    /// Makes a `systemctl` of these lines; `show` prints the file `state`.
    fn systemd(dir: &Path, script: &str) -> Systemd {
        let program = dir.join("systemctl");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).expect("written");
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("set");
        let runner =
            Runner::new(dir.join("output"), "/proc".into(), |_| false, 1).expect("a runner");
        Systemd {
            program,
            units: dir.join("units"),
            runner,
            proc: "/proc".into(),
            clock: Arc::new(SystemClock::default()),
        }
    }

    #[tokio::test]
    async fn state_of_a_service_is_that_of_its_unit() {
        let dir = tempfile::tempdir().expect("a directory");
        let say = |text: &str| std::fs::write(dir.path().join("state"), text).expect("written");
        let script = format!("test $1 = show && cat {}/state", dir.path().display());
        let systemd = systemd(dir.path(), &script);
        let now_ms = systemd.clock.now_ms();
        say(&format!("MainPID={}\nActiveState=active\nInvocationID=ab12\n", std::process::id()));
        let Service::On(run) = systemd.state(Colour::Blue).await.expect("a state") else {
            panic!("it runs")
        };
        assert_eq!(run.invocation, "ab12");
        assert!(run.started_ms <= now_ms + 1000 && run.started_ms + 600_000 > now_ms, "{run:?}");
        for (text, state) in [
            ("MainPID=0\nActiveState=inactive\nInvocationID=\n", Service::Off),
            ("MainPID=0\nActiveState=failed\n", Service::Off),
            ("MainPID=0\nActiveState=activating\n", Service::Busy),
            ("MainPID=7\nActiveState=deactivating\n", Service::Busy),
            // It ended since.
            ("MainPID=4194305\nActiveState=active\nInvocationID=x\n", Service::Busy),
        ] {
            say(text);
            assert_eq!(systemd.state(Colour::Green).await.expect("a state"), state, "{text}");
        }
        say("UnitFileState=enabled\n");
        assert!(systemd.is_enabled().await.expect("known"));
        for text in ["UnitFileState=disabled\n", "UnitFileState=masked\n", "UnitFileState=\n"] {
            say(text);
            assert!(!systemd.is_enabled().await.expect("known"), "{text}");
        }
    }

    #[tokio::test]
    async fn low_ports_are_permitted_once_and_again_after_a_failure() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = dir.path().display();
        let script = format!(
            "test $1 = show && {{ cat {at}/need || true; exit 0; }}; echo $* >> {at}/calls; ! test -e {at}/broken"
        );
        let systemd = systemd(dir.path(), &script);
        let calls = || std::fs::read_to_string(dir.path().join("calls")).unwrap_or_default();
        let need = |text: &str| std::fs::write(dir.path().join("need"), text).expect("written");
        need("NeedDaemonReload=no\n\nNeedDaemonReload=no\n");
        systemd.permit_low_ports(false).await.expect("nothing to do");
        assert_eq!(calls(), "");
        std::fs::write(dir.path().join("broken"), "").expect("written");
        systemd.permit_low_ports(true).await.expect_err("systemd does not read it");
        std::fs::remove_file(dir.path().join("broken")).expect("removed");
        for _ in 0..2 {
            systemd.permit_low_ports(true).await.expect("permitted");
        }
        assert_eq!(calls(), "daemon-reload\ndaemon-reload\n");
        assert!(low_ports::drop_ins(&systemd.units).iter().all(|path| path.exists()));
        systemd.permit_low_ports(false).await.expect("taken back");
        assert!(!low_ports::drop_ins(&systemd.units).iter().any(|path| path.exists()));
        assert_eq!(calls().lines().count(), 3);
        // Of an agent that ended before it had systemd read them.
        need("NeedDaemonReload=no\n\nNeedDaemonReload=yes\n");
        systemd.permit_low_ports(false).await.expect("read");
        assert_eq!(calls().lines().count(), 4);
    }

    #[tokio::test]
    async fn failed_start_tells_the_words_of_systemctl() {
        let dir = tempfile::tempdir().expect("a directory");
        let systemd = systemd(dir.path(), "echo \"Job for $2 failed.\" >&2; exit 1");
        let why = systemd.start(Colour::Green).await.expect_err("failed").to_string();
        assert!(why.contains("Job for pve-sandbox-ingress-green.service failed."), "{why}");
    }
}
