//! `lxc-attach` in a lab node. Debian's LXC moves what it starts into the container's v2 cgroup,
//! but knows nothing of v1 controllers that a machine may have beside it: a command would use the
//! node's CPU and memory outside its sandbox's limits. This program joins the container's v1
//! cgroups and then becomes the real one.

use std::{
    ffi::{CString, OsString},
    fs, io,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::Path,
    process::ExitCode,
};

use nix::unistd::execv;

use super::cgroup::{V1, leg};
use crate::{failure::ignore, roots::Roots};

/// Name under which a node calls this program.
pub(crate) const NAME: &str = "lxc-attach";
/// Path of Debian's `lxc-attach` in a lab node.
pub const REAL: &str = "/usr/libexec/pve-lab/lxc-attach";
/// Exit code of `lxc-attach` when nothing was started.
const NOT_STARTED: u8 = 255;

/// Joins the cgroups of the container that the arguments name, then executes the real program.
pub(crate) fn main(roots: &Roots, argv: &[OsString]) -> ExitCode {
    let error = match named(argv).map_or(Ok(()), |vmid| join(roots, vmid)) {
        Ok(()) => become_real(argv),
        Err(error) => error,
    };
    ignore(io::Write::write_all(&mut io::stderr(), format!("{NAME}: {error}\n").as_bytes()));
    ExitCode::from(NOT_STARTED)
}

/// Returns the container: the value of `-n` or `--name`, before the command.
fn named(argv: &[OsString]) -> Option<u32> {
    let mut own = argv.iter().take_while(|word| *word != "--").map(|word| word.as_bytes());
    while let Some(word) = own.next() {
        let name = match word {
            b"-n" | b"--name" => own.next()?,
            word => match word.strip_prefix(b"--name=").or_else(|| word.strip_prefix(b"-n")) {
                Some(name) => name,
                None => continue,
            },
        };
        return str::from_utf8(name).ok()?.parse().ok();
    }
    None
}

/// Moves this process into the container's cgroups. A container that does not run has none; the
/// real program then reports its own error.
fn join(roots: &Roots, vmid: u32) -> io::Result<()> {
    for controller in V1 {
        let Some(dir) = leg(roots, controller, vmid).filter(|dir| dir.is_dir()) else { continue };
        fs::write(dir.join("cgroup.procs"), "0")?;
    }
    Ok(())
}

fn become_real(argv: &[OsString]) -> io::Error {
    let words = std::iter::once(OsString::from(NAME)).chain(argv.iter().cloned());
    let words: Result<Vec<CString>, _> = words.map(|word| CString::new(word.into_vec())).collect();
    let program = CString::new(Path::new(REAL).as_os_str().as_bytes());
    match (program, words) {
        (Ok(program), Ok(words)) => match execv(&program, &words) {
            Err(error) => error.into(),
        },
        (Err(error), _) | (_, Err(error)) => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name_in(words: &[&str]) -> Option<u32> {
        named(&words.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn the_container_is_found_in_the_arguments() {
        assert_eq!(name_in(&["-n", "101", "--clear-env", "--", "true"]), Some(101));
        assert_eq!(name_in(&["-P", "/x", "--name=102", "--", "true"]), Some(102));
        assert_eq!(name_in(&["-n103", "--", "true"]), Some(103));
        assert_eq!(name_in(&["--name", "104"]), Some(104));
        assert_eq!(name_in(&["--", "-n", "105"]), None, "that belongs to the command");
        assert_eq!(name_in(&["-n"]), None);
        assert_eq!(name_in(&["-n", "web"]), None);
    }

    #[test]
    fn only_the_cgroups_of_that_container_are_joined() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (mut roots, _) = Roots::below(dir.path());
        roots.lab_cgroup = dir.path().join("cgroup");
        for controller in ["memory", "cpu"] {
            let root = roots.lab_cgroup.join(controller);
            fs::create_dir_all(root.join("lxc/101")).expect("a cgroup");
            fs::write(root.join("cgroup.procs"), "").expect("the node's own");
        }
        join(&roots, 101).expect("joined");
        join(&roots, 102).expect("a container that does not run is left to the real program");
        let joined = |path: &str| fs::read_to_string(roots.lab_cgroup.join(path)).ok();
        for controller in ["memory", "cpu"] {
            assert_eq!(joined(&format!("{controller}/lxc/101/cgroup.procs")).as_deref(), Some("0"));
            assert_eq!(joined(&format!("{controller}/cgroup.procs")).as_deref(), Some(""));
            assert_eq!(joined(&format!("{controller}/lxc/102/cgroup.procs")), None);
        }
    }
}
