//! Whether the state directory is the agent's alone. `state_dir` of the configuration can name any
//! directory, and its removal takes everything that is in it.

use std::{fs, io, path::Path};

use super::Error;

/// Files and directories of the agent there, by the beginning of their names: SQLite and renewals put
/// others beside them, such as `journal.sqlite-wal`.
const OURS: [&str; 5] = ["journal.sqlite", "secret.key", "owners", "exec", "template"];
/// Most entries that are looked at; the agent has about ten.
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
    for entry in fs::read_dir(&real).map_err(failed)?.take(ENTRIES_MAX) {
        names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    obstacle(&names)
        .map_or(Ok(()), |why| Err(Error::NotOurs { dir: dir.display().to_string(), why }))
}

/// Says why a directory with these entries is not the agent's alone; `None` if it is. Pure.
fn obstacle(names: &[String]) -> Option<String> {
    if !names.iter().any(|name| name == OURS[0]) {
        return Some(format!("it has no {}, so it is no directory of an agent", OURS[0]));
    }
    let is_ours = |name: &String| OURS.iter().any(|ours| name.starts_with(ours));
    let others: Vec<&str> =
        names.iter().filter(|name| !is_ours(name)).map(String::as_str).collect();
    let shown = &others[..others.len().min(SHOWN_MAX)];
    let more = others.len() - shown.len();
    let and_more = if more > 0 { format!(" and {more} more") } else { String::new() };
    (!others.is_empty())
        .then(|| format!("it also has {}{and_more}, which are not the agent's", shown.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

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
