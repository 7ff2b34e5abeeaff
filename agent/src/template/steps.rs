//! The programs that `template init` runs, one function each.

use std::{
    ffi::OsString,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use daemon::replace::{Access, replace};
use proto::id::Vmid;
use tokio::time::Instant;

use super::{
    BUILD, CLONE_VMIDS, CUSTOMISE, DHCP_CLIENT, Error, Order, PACKAGES, PCT, Source, unfinished,
};
use crate::{
    pve::{ErrorKind, Operation, outcome, template_mark::TemplateMark},
    run::{Exit, Finished, Program, Runner},
    sys::read,
};

const MMDEBSTRAP: &str = "/usr/bin/mmdebstrap";
/// Programs that the help of `template init` promises, beside the web server, each with what makes it say its
/// version and succeed.
const PROGRAMS: &[[&str; 2]] =
    &[["git", "--version"], ["curl", "--version"], ["ssh", "-V"], ["python3", "--version"]];
/// Pause between two attempts to reach the clone's web server.
const PAUSE: Duration = Duration::from_millis(500);

/// Host on which the template is made.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) runner: Runner,
    /// Path of `pct`.
    pub(super) pct: PathBuf,
    /// Directory for the archive.
    pub(super) work: PathBuf,
}

impl Host {
    /// Builds the archive of the root directory.
    pub(super) async fn build(&self, suite: &str, mirror: &str) -> Result<PathBuf, Error> {
        let what = "mmdebstrap";
        if !Path::new(MMDEBSTRAP).exists() {
            let why = format!("{MMDEBSTRAP} is missing: apt install mmdebstrap");
            return Err(Error::Step { what, why });
        }
        let file = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::File { path, source }
        };
        let hook = self.work.join("customise.sh");
        fs::write(&hook, CUSTOMISE).map_err(file(&hook))?;
        fs::set_permissions(&hook, Permissions::from_mode(0o755)).map_err(file(&hook))?;
        let archive = self.work.join("template.tar");
        let arguments = [
            "--mode=root".into(),
            "--variant=apt".into(),
            format!("--include={PACKAGES},{}", dhcp_client(suite)),
            // What no sandbox reads and every clone would carry.
            "--dpkgopt=path-exclude=/usr/share/man/*".into(),
            "--dpkgopt=path-exclude=/usr/share/doc/*".into(),
            "--dpkgopt=path-exclude=/usr/share/locale/*".into(),
            format!("--customize-hook={}", hook.display()),
            suite.to_owned(),
            archive.display().to_string(),
            mirror.to_owned(),
        ];
        let path = PathBuf::from(MMDEBSTRAP);
        let done = self.run(what, path, arguments.map(OsString::from).to_vec(), BUILD).await?;
        if done.exit != Exit::Code(0) {
            let lines: Vec<&str> = done.stderr.lines().filter(|line| !line.is_empty()).collect();
            let why = lines[lines.len().saturating_sub(3)..].join("; ");
            return Err(Error::Step { what, why });
        }
        Ok(archive)
    }

    fn intent(&self) -> PathBuf {
        self.work.join("creating")
    }

    /// Returns the container that an interrupted run was creating.
    pub(super) fn begun(&self) -> Option<Vmid> {
        let text = read::text(&self.intent(), read::SMALL);
        text.trim().parse().ok()
    }

    /// Notes durably which container is created.
    pub(super) fn begin(&self, vmid: Vmid) -> Result<(), Error> {
        let path = self.intent();
        let written = replace(&path, vmid.to_string().as_bytes(), Access::PRIVATE);
        written.map_err(|source| Error::File { path, source })
    }

    /// Forgets which container was created: its description says so.
    pub(super) fn end(&self) {
        if let Err(error) = fs::remove_file(self.intent()) {
            tracing::warn!(%error, "the note of a container that is created was not removed");
        }
    }

    /// Creates the container from the archive.
    pub(super) async fn create(
        &self,
        order: &Order,
        archive: &str,
    ) -> Result<Result<(), ErrorKind>, Error> {
        let Order { vmid, storage, disk_gib, bridge, .. } = order;
        let mut arguments = vec!["create".into(), vmid.to_string(), archive.to_owned()];
        for (name, value) in [
            ("arch", "amd64".to_owned()),
            ("ostype", "debian".to_owned()),
            ("hostname", "debian".to_owned()),
            ("description", unfinished(*vmid)),
            ("unprivileged", "1".to_owned()),
            ("features", "nesting=1".to_owned()),
            ("cores", order.cores.to_string()),
            ("memory", order.memory_mib.to_string()),
            ("swap", "0".to_owned()),
            ("onboot", "0".to_owned()),
            ("rootfs", format!("{storage}:{disk_gib}")),
            ("net0", format!("name=eth0,bridge={bridge},ip=manual,type=veth")),
        ] {
            arguments.extend([format!("--{name}"), value]);
        }
        if let Some(address) = order.name_server {
            arguments.extend(["--nameserver".into(), address.to_string()]);
        }
        self.pct_kind(arguments).await
    }

    /// Makes the container a template. `pct` exits with 0 whatever happens.
    pub(super) async fn make_template(&self, vmid: Vmid) -> Result<(), Error> {
        self.pct("pct template", vec!["template".into(), vmid.to_string()]).await
    }

    /// Takes the lock of a `pct` that has ended from a container.
    pub(super) async fn unlock(&self, vmid: Vmid) -> Result<(), Error> {
        self.pct("pct unlock", vec!["unlock".into(), vmid.to_string()]).await
    }

    /// Removes a container, also one that runs.
    pub(super) async fn destroy(&self, vmid: Vmid) -> Result<(), Error> {
        let force = ["--force".into(), "1".into()];
        let arguments = ["destroy".into(), vmid.to_string()].into_iter().chain(force).collect();
        self.pct("pct destroy", arguments).await
    }

    /// Starts a clone, waits until it is ready, and removes the clone, whatever happens.
    pub(super) async fn check_clone(&self, order: &Order) -> Result<(), Error> {
        let clone = self.clone_of(order.vmid).await?;
        let works = match self.pct("pct start", vec!["start".into(), clone.to_string()]).await {
            Ok(()) => self.ready(clone, order).await,
            Err(error) => Err(error),
        };
        let removed = self.destroy(clone).await;
        works.and(removed)
    }

    async fn clone_of(&self, template: Vmid) -> Result<Vmid, Error> {
        for next in 1..=CLONE_VMIDS {
            let Ok(vmid) = Vmid::try_from(template.get() + next) else { continue };
            let arguments = [
                "clone".into(),
                template.to_string(),
                vmid.to_string(),
                "--hostname".into(),
                "template-check".into(),
                "--description".into(),
                unfinished(vmid),
            ];
            match self.pct_kind(arguments.to_vec()).await? {
                Ok(()) => return Ok(vmid),
                Err(ErrorKind::VmidTaken(_)) => {}
                Err(kind) => {
                    return Err(Error::Step { what: "pct clone", why: kind.to_string() });
                }
            }
        }
        Err(Error::AllTaken(CLONE_VMIDS, template))
    }

    async fn ready(&self, clone: Vmid, order: &Order) -> Result<(), Error> {
        let until = Instant::now() + order.patience;
        let check = match &order.http {
            Some((port, path)) => {
                let url = format!("http://127.0.0.1:{port}{path}");
                let options = ["curl", "-fsS", "--max-time", "5", "-o", "/dev/null"];
                options.into_iter().map(str::to_owned).chain([url]).collect()
            }
            None => vec!["true".to_owned()],
        };
        loop {
            let Err(why) = self.exec(clone, &check).await? else { break };
            if Instant::now() >= until {
                return Err(Error::NoAnswer(why, order.vmid));
            }
            tokio::time::sleep(PAUSE).await;
        }
        let programs = match order.source {
            Source::Debian { .. } => PROGRAMS,
            // It has what the operator put into it.
            Source::Archive(_) => &[],
        };
        for words in programs {
            if let Err(why) = self.exec(clone, &words.map(str::to_owned)).await? {
                let why = format!("`{}` failed: {why}", words.join(" "));
                return Err(Error::NoAnswer(why, order.vmid));
            }
        }
        Ok(())
    }

    /// Runs a command in a clone; returns the last line of its error text when it fails.
    async fn exec(&self, clone: Vmid, command: &[String]) -> Result<Result<(), String>, Error> {
        let clone = clone.to_string();
        let words = ["exec", &clone, "--keep-env", "0", "--"].map(str::to_owned);
        let arguments = words.iter().chain(command).map(OsString::from).collect();
        let done = self.run("pct exec", self.pct.clone(), arguments, PCT).await?;
        if done.exit == Exit::Code(0) {
            return Ok(Ok(()));
        }
        Ok(Err(done.stderr.trim().lines().last().unwrap_or("no error text").to_owned()))
    }

    /// Writes the mark: from now on the agent offers the snapshot.
    pub(super) async fn describe(&self, order: &Order) -> Result<(), Error> {
        let Order { snapshot, cores, memory_mib, http, .. } = order.clone();
        let mark = TemplateMark { snapshot, cores, memory_mib, http };
        let words =
            ["set".into(), order.vmid.to_string(), "--description".into(), mark.to_string()];
        self.pct("pct set", words.to_vec()).await
    }

    async fn pct(&self, what: &'static str, arguments: Vec<String>) -> Result<(), Error> {
        let result = self.pct_kind(arguments).await?;
        result.map_err(|kind| Error::Step { what, why: kind.to_string() })
    }

    async fn pct_kind(&self, arguments: Vec<String>) -> Result<Result<(), ErrorKind>, Error> {
        let op = arguments.first().and_then(|command| Operation::of_pct(command));
        let arguments = arguments.into_iter().map(OsString::from).collect();
        let done = self.run("pct", self.pct.clone(), arguments, PCT).await?;
        Ok(outcome::judge(op, done.exit, &done.stdout, &done.stderr))
    }

    async fn run(
        &self,
        what: &'static str,
        path: PathBuf,
        arguments: Vec<OsString>,
        limit: Duration,
    ) -> Result<Finished, Error> {
        let run = self.runner.run(Program { path, arguments }, Instant::now() + limit).await;
        run.map_err(|error| Error::Step { what, why: daemon::chain::Chain(&error).to_string() })
    }
}

/// Returns the package with the DHCP client of a release.
fn dhcp_client(suite: &str) -> &'static str {
    let (old, old_client, client) = DHCP_CLIENT;
    if old.contains(&suite) { old_client } else { client }
}
