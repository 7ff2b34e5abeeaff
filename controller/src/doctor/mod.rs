//! `doctor`: looks at the controller's machine and says what is wrong, each finding with its remedy. `look`
//! sees, and has all effects; `checks` decides and is pure.

mod api;
mod certificates;
mod ssh;

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use daemon::doctor::{Check, Report, State, certificate::Now, reach};
use nix::unistd;
use proto::visibility::Visibility;

use crate::{
    ca,
    clock::{Clock, SystemClock},
    config::{Config, DATA_DIR, Error},
    setup,
    store::sqlite_look::{self, Looked},
};

const RESTART: &str = "systemctl restart pve-sandbox-controller";

/// Observations of a controller whose configuration can be used.
#[derive(Debug)]
struct Facts {
    now: Now,
    certificates: Vec<certificates::Looked>,
    /// Names in the controller's certificate; `None` where they cannot be read.
    names: Option<Vec<String>>,
    /// Host names of this machine.
    host_names: Vec<String>,
    /// Database; `None` when it is not there.
    database: Option<Result<Looked, String>>,
    /// Files below the data directory that the service's user does not own, and that user's numbers.
    foreign: Result<(Vec<PathBuf>, (u32, u32)), String>,
    /// Listener where the API should be; `None` without a CA.
    api: Option<api::Facts>,
    /// SSH server; `None` when there is to be none.
    ssh: Option<ssh::Facts>,
}

/// Looks at everything; asks the program `timedatectl` for the clock.
pub async fn run(path: &Path, timedatectl: &Path) -> Report {
    let config = Config::load(path);
    if let Some(check) = privileges(unistd::Uid::effective(), &owners(&config)) {
        // Of what it may not read, it would say that it is not there.
        return Report::new(vec![check]);
    }
    let synchronised = reach::is_synchronised(timedatectl).await;
    let mut checks = configuration(path, &config);
    checks.push(reach::clock(synchronised));
    if let Ok(config) = &config {
        let facts = look(path, config, synchronised).await;
        checks.extend(self::checks(path, config, &facts));
    }
    Report::new(checks)
}

/// Returns the users who may read the controller's files: the service's, and the owner of the directory.
fn owners(config: &Result<Config, Error>) -> Vec<unistd::Uid> {
    owners_of(config.as_ref().map_or(Path::new(DATA_DIR), |config| &config.data_dir))
}

fn owners_of(dir: &Path) -> Vec<unistd::Uid> {
    let owner = fs::metadata(dir).ok().map(|about| unistd::Uid::from_raw(about.uid()));
    setup::service_user().into_iter().chain(owner).collect()
}

/// Refuses to judge for a user who may not read what is judged. Pure.
fn privileges(own: unistd::Uid, owners: &[unistd::Uid]) -> Option<Check> {
    if own.is_root() || owners.is_empty() || owners.contains(&own) {
        return None;
    }
    Some(Check::failed(
        "privileges",
        format!("uid {own}"),
        "neither root nor the service's user: it may not read the controller's files, so nothing was looked at",
        "run it again as root",
    ))
}

/// Looks at the files that the controller needs for its start, for `check-config`: the directory of its state, and
/// the certificates. Nothing else is asked or looked at.
pub fn of_files(path: &Path, config: &Config) -> Report {
    let dir = &config.data_dir;
    let wrong = match fs::metadata(dir) {
        Ok(about) if about.is_dir() => None,
        Ok(_) => Some("no directory".to_owned()),
        Err(error) => Some(error.to_string()),
    };
    if let Some(why) = wrong {
        let remedy = format!("pve-sandbox-controller setup{}", config_option(path));
        return Report::new(vec![Check::failed(
            "data-dir",
            dir.display().to_string(),
            why,
            remedy,
        )]);
    }
    if let Some(check) = privileges(unistd::Uid::effective(), &owners_of(dir)) {
        return Report::new(vec![Check { state: State::Warning, ..check }]);
    }
    let looked = certificates::look(path, config, &setup::host_names());
    let now = Now { ms: SystemClock.now_ms(), synchronised: None };
    let judge = |one| certificates::judge_before_start(one, now);
    Report::new(looked.iter().flat_map(judge).collect())
}

async fn look(path: &Path, config: &Config, synchronised: Option<bool>) -> Facts {
    let host_names = setup::host_names();
    let certificates = certificates::look(path, config, &host_names);
    let now_ms = SystemClock.now_ms();
    Facts {
        now: Now { ms: now_ms, synchronised },
        certificates,
        names: ca::names(&config.data_dir).ok(),
        host_names,
        database: config.database().exists().then(|| {
            sqlite_look::look(&config.database(), now_ms).map_err(|error| error.to_string())
        }),
        foreign: setup::foreign(&config.data_dir).map_err(|error| error.to_string()),
        api: api::look(config).await,
        ssh: match &config.ssh {
            Some(ssh) => Some(ssh::look(config, ssh).await),
            None => None,
        },
    }
}

/// Option that names a data directory which is not the usual one.
fn data_dir(config: &Config) -> String {
    let dir = &config.data_dir;
    match dir == Path::new(DATA_DIR) {
        true => String::new(),
        false => format!(" --data-dir {}", dir.display()),
    }
}

/// Option that names a configuration which is not the usual one.
fn config_option(path: &Path) -> String {
    match path == Path::new("/etc/pve-sandbox/controller.toml") {
        true => String::new(),
        false => format!(" --config {}", path.display()),
    }
}

fn configuration(path: &Path, config: &Result<Config, Error>) -> Vec<Check> {
    let path = path.display().to_string();
    let failed = |subject: &str, found: String, remedy: String| {
        vec![Check::failed("configuration", subject, found, remedy)]
    };
    match config {
        Ok(_) => vec![Check::ok("configuration", path, "complete and valid")],
        Err(Error::Load(daemon::config::Error::Read { source, .. }))
            if source.kind() == std::io::ErrorKind::NotFound =>
        {
            failed(&path, "not there".to_owned(), "pve-sandbox-controller setup".to_owned())
        }
        Err(Error::Load(error)) => {
            let found = daemon::chain::Chain(error).to_string();
            failed(&path, found, format!("edit {path}"))
        }
        Err(Error::Wrong(mistakes)) => {
            let remedy = || format!("edit it, then: pve-sandbox-controller check-config {path}");
            mistakes.iter().flat_map(|why| failed(&path, why.clone(), remedy())).collect()
        }
    }
}

/// Judges everything. Pure.
fn checks(path: &Path, config: &Config, facts: &Facts) -> Vec<Check> {
    let mut checks = Vec::new();
    for looked in &facts.certificates {
        checks.extend(certificates::judge(looked, facts.now));
    }
    checks.extend(names(config, facts));
    checks.extend(database(config, facts));
    checks.push(owner(config, facts));
    checks.push(domain(path, config));
    checks.extend(facts.api.as_ref().map(|facts| api::check(config, facts)));
    if let (Some(server), Some(facts)) = (&config.ssh, &facts.ssh) {
        checks.extend(ssh::checks(path, config, server, facts));
    }
    checks
}

/// Names by which callers and nodes reach this machine. A certificate that cannot be read is a finding by itself.
fn names(config: &Config, facts: &Facts) -> Option<Check> {
    if config.tls.cert.is_some() {
        let found = "callers see tls.cert; nodes need no name of this machine";
        return Some(Check::ok("names", "", found));
    }
    let names = facts.names.as_ref()?;
    let ip = config.listen.ip();
    let listen = (!ip.is_unspecified() && !ip.is_loopback()).then(|| ip.to_string());
    let wanted: Vec<_> = facts.host_names.iter().cloned().chain(listen).collect();
    let has = |name: &&String| names.iter().any(|known| known.eq_ignore_ascii_case(name));
    let missing: Vec<_> = wanted.iter().filter(|name| !has(name)).map(String::as_str).collect();
    if missing.is_empty() {
        let found = format!("the certificate is for {}", wanted.join(", "));
        return Some(Check::ok("names", "", found));
    }
    let options: Vec<_> = missing.iter().map(|name| format!("--name {name}")).collect();
    let (options, option) = (options.join(" "), data_dir(config));
    Some(Check::warning(
        "names",
        missing.join(", "),
        "callers that use this name are refused: it is not in the certificate",
        format!("pve-sandbox-controller init {options}{option}; {RESTART}"),
    ))
}

fn database(config: &Config, facts: &Facts) -> Vec<Check> {
    let path = config.database().display().to_string();
    let failed = |found: String, remedy: String| {
        vec![Check::failed("database", path.clone(), found, remedy)]
    };
    let restore = "stop the controller, and restore a backup: docs/operations.md";
    let looked = match &facts.database {
        Some(Ok(looked)) => looked,
        None => return failed("not there".to_owned(), "pve-sandbox-controller setup".to_owned()),
        Some(Err(why)) => return failed(why.clone(), restore.to_owned()),
    };
    if !looked.flaws.is_empty() {
        return failed(format!("damaged: {}", looked.flaws.join("; ")), restore.to_owned());
    }
    let Looked { version, newest, .. } = looked;
    if version > newest {
        let found = format!("schema {version}, and this program knows {newest}");
        return failed(found, "install a later pve-sandbox-controller".to_owned());
    }
    if version < newest {
        let found = format!("schema {version}; the next start makes {newest} of it");
        return vec![Check::warning("database", path, found, RESTART)];
    }
    let token = match looked.operators {
        Some(0) | None => {
            let option = data_dir(config);
            Check::failed(
                "tokens",
                "",
                "no token has the scope admin: nobody can manage nodes, teams and tokens",
                format!("pve-sandbox-controller token create --team main --scope admin{option}"),
            )
        }
        Some(count) => Check::ok("tokens", "", format!("{count} with the scope admin")),
    };
    vec![Check::ok("database", path, format!("sound, schema {version}")), token]
}

fn owner(config: &Config, facts: &Facts) -> Check {
    let dir = config.data_dir.display().to_string();
    match &facts.foreign {
        Ok((files, _)) if files.is_empty() => {
            Check::ok("owner", dir, "all files are the service's")
        }
        Ok((files, (uid, gid))) => {
            let first = files.first().map(|path| path.display().to_string()).unwrap_or_default();
            let count = files.len();
            let found = format!("{count} files are not the service's, {first} among them");
            Check::failed("owner", dir.clone(), found, format!("chown -R {uid}:{gid} {dir}"))
        }
        Err(why) => Check::failed("owner", dir, why.clone(), "pve-sandbox-controller setup"),
    }
}

fn domain(path: &Path, config: &Config) -> Check {
    let template = &config.url_template;
    if config.urls().without_ingress() {
        let option = config_option(path);
        return Check::warning(
            "url-template",
            template,
            "no domain: URLs of open ports lead to the containers, past the access rules, and only their \
             nodes reach these",
            format!("pve-sandbox-controller setup{option} --domain sandbox.example.org; {RESTART}"),
        );
    }
    let has_sessions = config.ingress.default_visibility != Visibility::Public;
    if has_sessions && !config.urls().is_https() && !is_on_this_machine(config) {
        return Check::warning(
            "url-template",
            template,
            "http: a browser keeps no session without https, so links to ports with visibility team do not work",
            format!("edit {}: url_template = \"https://...\"; {RESTART}", path.display()),
        );
    }
    Check::ok("url-template", template, "addresses of open ports are made from it")
}

/// Returns whether the domain is one of `localhost`, which a browser trusts without https.
fn is_on_this_machine(config: &Config) -> bool {
    let domain = config.urls().domain().unwrap_or_default();
    domain == "localhost" || domain.ends_with(".localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes the CA of a controller, which `change` changes, and returns what `check-config` says of its files.
    fn checked(change: impl FnOnce(&ca::Files, &Path)) -> Report {
        let dir = tempfile::tempdir().expect("a directory");
        let (files, _) = ca::init(dir.path(), &[]).expect("made");
        change(&files, &dir.path().join("ca"));
        let text = format!("data_dir = {:?}\nurl_template = \"\"\n", dir.path());
        let path = Path::new("/etc/pve-sandbox/controller.toml");
        of_files(path, &Config::parse(path, &text).expect("valid"))
    }

    #[test]
    fn certificates_that_were_never_made_are_made_by_setup() {
        let changes: [fn(&ca::Files, &Path); 2] = [
            |_, ca| fs::remove_dir_all(ca).expect("removed"),
            |_, ca| {
                fs::remove_dir_all(ca).expect("removed");
                fs::create_dir(ca).expect("made");
            },
        ];
        for change in changes {
            let report = checked(change);
            let found: Vec<_> = report.findings().map(|check| (check.name, check.state)).collect();
            let names = ["ca", "ingress-ca", "client-ca", "certificate"];
            assert_eq!(found, names.map(|name| (name, State::Failed)));
            for check in report.findings() {
                assert_eq!(check.remedy.as_deref(), Some("pve-sandbox-controller setup"));
            }
        }
    }

    #[test]
    fn what_the_next_start_makes_is_a_warning() {
        type Change = fn(&ca::Files, &Path);
        let changes: [(&str, Change); 2] = [
            ("client-ca", |_, ca| {
                for name in ca::CLIENT_CA_FILES {
                    fs::remove_file(ca.join(name)).expect("removed");
                }
            }),
            ("certificate", |files, _| {
                ca::renew_own(files, std::time::Duration::ZERO).expect("made");
            }),
        ];
        for (name, change) in changes {
            let report = checked(change);
            let found: Vec<_> = report.findings().collect();
            let [one] = &found[..] else { panic!("{name}: {found:?}") };
            assert_eq!((one.name, one.state), (name, State::Warning), "{one:?}");
            assert_eq!(one.remedy.as_deref(), Some(RESTART));
        }
        // Half of a CA is lost, and no start makes it.
        let report = checked(|_, ca| fs::remove_file(ca.join("client-ca.key")).expect("removed"));
        assert!(report.has_failed(), "{report:?}");
    }

    #[test]
    fn sessions_of_browsers_need_https() {
        for (scheme, domain, visibility, is_right) in [
            ("https", "x.test", "team", true),
            ("http", "x.test", "team", false),
            ("http", "x.test", "token", false),
            ("http", "x.test", "public", true),
            ("http", "sandbox.localhost:8480", "team", true),
        ] {
            let text = format!(
                "url_template = \"{scheme}://port-{{port}}-{{id}}.{domain}\"\n\
                 [ingress]\ndefault_visibility = \"{visibility}\"\n"
            );
            let path = Path::new("controller.toml");
            let check = super::domain(path, &Config::parse(path, &text).expect("valid"));
            assert_eq!(check.remedy.is_none(), is_right, "{text} {check:?}");
        }
    }

    #[test]
    fn only_root_and_the_owners_are_given_a_verdict() {
        let uid = unistd::Uid::from_raw;
        assert_eq!(privileges(uid(0), &[uid(990)]), None);
        assert_eq!(privileges(uid(990), &[uid(990), uid(0)]), None);
        assert_eq!(privileges(uid(1000), &[]), None, "a machine without a controller");
        let refused = privileges(uid(1000), &[uid(990)]).expect("refused");
        assert_eq!((refused.name, refused.subject.as_str()), ("privileges", "uid 1000"));
    }
}
