//! No core dump of a process that holds secrets.

use std::io;

/// Forbids core dumps of this process, whatever the limits of its unit and the pattern of the host say,
/// and lets only root look into its memory. What it starts is not affected. Comes first in `main`.
///
/// # Errors
/// When the kernel refuses, which it does not do.
pub fn forbid() -> io::Result<()> {
    Ok(nix::sys::prctl::set_dumpable(false)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test starts a program")]
    fn process_is_not_dumped_and_its_children_may_be() {
        forbid().expect("the kernel does it");
        assert!(!nix::sys::prctl::get_dumpable().expect("read"));
        // The owner of a process that may not be dumped is root; a program that it starts is its own.
        let script = "[ -r /proc/self/environ ]";
        let child = std::process::Command::new("/bin/sh").args(["-c", script]).status();
        assert!(child.expect("started").success());
    }
}
