//! Drop-in of Caddy's units by which Caddy may listen on ports below 1024. It is there only while a setting needs
//! it: otherwise Caddy has no capability at all.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use daemon::replace::Access;

use super::switch::Colour;
use crate::sys::read;

/// Name of the drop-in.
const NAME: &str = "low-ports.conf";
/// Content of the drop-in. The unit itself has both sets empty.
const CONTENT: &str = "\
# Made by pve-sandbox-agent, and removed when no port of [ingress.certificate] is below 1024.
[Service]
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
AmbientCapabilities=CAP_NET_BIND_SERVICE
";

/// Lists the drop-ins below a directory of units.
pub fn drop_ins(units: &Path) -> [PathBuf; 2] {
    Colour::ALL.map(|colour| units.join(format!("{}.d", colour.unit())).join(NAME))
}

/// Makes or removes the drop-ins. Returns true when something has changed: systemd is to read its units again.
///
/// # Errors
/// When a file cannot be written or removed.
pub fn arrange(units: &Path, allow: bool) -> io::Result<bool> {
    let mut has_changed = false;
    for path in drop_ins(units) {
        has_changed |= if allow { make(&path)? } else { remove(&path)? };
    }
    Ok(has_changed)
}

fn make(path: &Path) -> io::Result<bool> {
    if read::whole(path, read::SMALL).is_ok_and(|there| there == CONTENT.as_bytes()) {
        return Ok(false);
    }
    path.parent().map(fs::create_dir_all).transpose()?;
    daemon::replace::replace(path, CONTENT.as_bytes(), Access { mode: 0o644, group: None })?;
    Ok(true)
}

fn remove(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    }
    // An operator's own drop-in keeps the directory.
    drop(path.parent().map(fs::remove_dir));
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drop_ins_are_there_while_they_are_needed() {
        let units = tempfile::tempdir().expect("a directory");
        let changed = |allow| arrange(units.path(), allow).expect("arranged");
        assert!(!changed(false), "there is none");
        assert!(changed(true));
        assert!(!changed(true), "they are there");
        let [blue, green] = drop_ins(units.path());
        for path in [&blue, &green] {
            assert_eq!(fs::read_to_string(path).expect("there"), CONTENT);
        }
        fs::write(&green, "[Service]\n").expect("written");
        assert!(changed(true), "a change by hand is put back");
        assert_eq!(fs::read_to_string(&green).expect("there"), CONTENT);

        // What an operator has put beside it stays.
        let own = blue.with_file_name("own.conf");
        fs::write(&own, "").expect("written");
        assert!(changed(false));
        assert!(own.exists() && !blue.exists());
        assert!(!green.parent().expect("a directory").exists());
    }
}
