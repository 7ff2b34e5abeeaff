//! Whether the state directory is the agent's alone. `state_dir` of the configuration can name any
//! directory, and its removal takes everything that is in it.

use std::{fs, io, path::Path};

use daemon::seal::KEY_FILE;

use super::Error;

/// Memory of which node owns which sandbox.
pub const OWNERS: &str = "owners";
/// List of the nodes whose certificates are refused.
pub const REVOKED_NODES: &str = "revoked-nodes";
/// Directory of the named sandboxes of all nodes.
pub const SANDBOX_NAMES: &str = "sandbox-names";
/// File that says that `join` has masked Debian's caddy.service.
pub const MASKED_CADDY: &str = "masked-caddy";
/// Directory in which templates are made.
pub const TEMPLATE: &str = "template";

/// Name of the journal.
const JOURNAL: &str = "journal.sqlite";
/// Files that have others beside them, such as `journal.sqlite-wal` and `secret.key.broken`.
const WITH_OTHERS: [&str; 2] = [JOURNAL, KEY_FILE];
/// Files that are replaced in one step: a crash may leave `NAME.new`.
const REPLACED: [&str; 5] = [OWNERS, REVOKED_NODES, SANDBOX_NAMES, MASKED_CADDY, "ingress-run"];
/// Files and directories without anything beside them.
const ALONE: [&str; 2] = [TEMPLATE, "exec"];
/// Most entries; the agent has about fifteen.
const ENTRIES_MAX: usize = 1000;
/// Most names that are shown.
const SHOWN_MAX: usize = 5;

/// Checks that a directory can be removed with all that is in it: it is the one of the package, or it has a
/// journal and nothing that is not the agent's. One that does not exist is fine.
///
/// # Errors
/// [`Error::NotOurs`] for any other, and [`Error::Data`] for one that cannot be read.
pub fn check_data(dir: &Path, of_the_package: &Path) -> Result<(), Error> {
    let failed = |error| Error::Data(dir.display().to_string(), error);
    let real = match fs::canonicalize(dir) {
        Ok(real) => real,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if real == of_the_package {
        return Ok(());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(&real).map_err(failed)?.take(ENTRIES_MAX + 1) {
        names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    obstacle(&names)
        .map_or(Ok(()), |why| Err(Error::NotOurs { dir: dir.display().to_string(), why }))
}

/// Says why a directory with these entries is not the agent's alone; `None` if it is. Pure.
fn obstacle(names: &[String]) -> Option<String> {
    if names.len() > ENTRIES_MAX {
        return Some(format!("it has more than {ENTRIES_MAX} entries, and an agent has a few"));
    }
    if !names.iter().any(|name| name == JOURNAL) {
        return Some(format!("it has no {JOURNAL}, so it is no directory of an agent"));
    }
    let others: Vec<&str> =
        names.iter().filter(|name| !is_ours(name)).map(String::as_str).collect();
    let shown = &others[..others.len().min(SHOWN_MAX)];
    let more = others.len() - shown.len();
    let and_more = if more > 0 { format!(" and {more} more") } else { String::new() };
    (!others.is_empty())
        .then(|| format!("it also has {}{and_more}, which are not the agent's", shown.join(", ")))
}

fn is_ours(name: &str) -> bool {
    let is_beside = |ours: &str| {
        name.strip_prefix(ours).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '.']))
    };
    let is_draft = |ours: &str| name.strip_suffix(".new").unwrap_or(name) == ours;
    WITH_OTHERS.into_iter().any(is_beside)
        || REPLACED.into_iter().any(is_draft)
        || ALONE.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(all: &[&str]) -> Vec<String> {
        all.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn names_that_begin_like_ours_are_not_ours() {
        let record = crate::caddy_settings::RECORD;
        let ours = ["journal.sqlite", "journal.sqlite.lock", "journal.sqlite.reserve", record];
        let more = ["revoked-nodes", "revoked-nodes.new", "masked-caddy.new", "template", "owners"];
        let last = ["sandbox-names", "sandbox-names.new"];
        assert_eq!(obstacle(&names(&[&ours[..], &more, &last].concat())), None);
        for name in ["templates", "executables", "owners-2024.csv", "template.old", "secret.keys"] {
            let why = obstacle(&names(&["journal.sqlite", name]));
            assert!(why.is_some_and(|why| why.contains(name)), "{name}");
        }
    }

    #[test]
    fn directory_with_very_many_entries_is_not_removed() {
        let all: Vec<String> =
            (0..=ENTRIES_MAX).map(|number| format!("journal.sqlite-{number}")).collect();
        assert!(obstacle(&all).is_some_and(|why| why.contains("more than")));
    }

    #[test]
    fn only_a_directory_with_a_journal_and_nothing_else_is_removed() {
        let top = tempfile::tempdir().expect("a directory");
        let top = top.path().canonicalize().expect("a path");
        let (package, other) = (top.join("pve-sandbox-agent"), top.join("other"));
        let why = |dir: &Path| check_data(dir, &package).map_err(|error| error.to_string());
        check_data(&other, &package).expect("there is nothing to remove");
        fs::create_dir(&other).expect("made");
        assert!(why(&other).expect_err("no journal").contains("journal.sqlite"));
        for name in ["journal.sqlite", "journal.sqlite-wal", "secret.key.broken", "owners.new"] {
            fs::write(other.join(name), "").expect("written");
        }
        fs::create_dir(other.join("exec")).expect("made");
        why(&other).expect("the agent's alone");
        for number in 0..9 {
            fs::write(other.join(format!("photo{number}")), "").expect("written");
        }
        let told = why(&other).expect_err("photos");
        assert!(told.contains("photo0, photo1") && told.contains("4 more"), "{told}");
        assert!(told.contains("--data keep"), "{told}");

        // The package's own directory, also by another name; not what another name leads to.
        fs::create_dir(&package).expect("made");
        fs::write(package.join("of a later version"), "").expect("written");
        let link = top.join("link");
        std::os::unix::fs::symlink(&package, &link).expect("linked");
        why(&package).expect("it is the agent's");
        why(&link).expect("it is the agent's");
        fs::remove_dir_all(&package).expect("removed");
        std::os::unix::fs::symlink(&other, &package).expect("linked");
        why(&package).expect_err("photos");
    }

    #[test]
    fn directories_of_the_system_are_never_removed() {
        for dir in ["/", "/etc", "/var", "/var/lib", "/usr", "/home", "/root", "/tmp", "/dev"] {
            let checked = check_data(Path::new(dir), Path::new("/var/lib/pve-sandbox-agent"));
            assert!(matches!(checked, Err(Error::NotOurs { .. })), "{dir}: {checked:?}");
        }
    }
}
