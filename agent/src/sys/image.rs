//! Programs and orders as sealed memory files, which nothing can change any more: not the process
//! that runs them, not through /proc/PID/exe, not root.

use std::{fs::File, io::Write, os::fd::OwnedFd};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};

/// Program that runs inside sandboxes.
pub const HELPER: &[u8] = include_bytes!(env!("PVE_SANDBOX_HELPER"));

/// Creates a sealed memory file with these bytes. Its offset is at its end.
///
/// # Errors
/// When the kernel has no memory for it, or no memory files.
pub fn sealed(name: &str, bytes: &[u8]) -> std::io::Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let mut file = File::from(memfd_create(name, flags)?);
    file.write_all(bytes)?;
    let seals = SealFlag::F_SEAL_SEAL
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_WRITE;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn sealed_file_cannot_be_changed() {
        let file = File::from(sealed("test", b"as it was").expect("made"));
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        assert!((&file).write_all(b"x").is_err() && file.set_len(0).is_err());
        // Opening it anew allows no writes either.
        let again = File::options().write(true).open(&path);
        assert!(again.map_or(true, |mut file| file.write_all(b"x").is_err()));
        let mut text = String::new();
        File::open(path).expect("opened").read_to_string(&mut text).expect("read");
        assert_eq!(text, "as it was");
    }
}
