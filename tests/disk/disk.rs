//! A separate file system that can be full and can lose its power.

use std::{fs::File, os::fd::AsRawFd as _, path::PathBuf, process::Command};

use nix::mount::{MntFlags, umount2};

/// ioctl of ext4 that shuts a file system down at once; linux/fs: `_IOR('X', 125, __u32)`.
const EXT4_IOC_SHUTDOWN: nix::libc::c_ulong = 0x8004_587d;
/// Flag: do not write the journal of the file system, as in a power cut.
const NOLOGFLUSH: u32 = 2;

/// A file system that is mounted until it is dropped.
pub(crate) struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    /// Creates an ext4 on a loop device, with a size of `mib` MiB.
    pub(crate) fn ext4(mib: u64) -> Self {
        let disk = Self { dir: tempfile::tempdir().expect("a directory") };
        let image = File::create(disk.image()).expect("created");
        image.set_len(mib << 20).expect("sized");
        std::fs::create_dir(disk.path()).expect("created");
        run(Command::new("mkfs.ext4").arg("-q").arg(disk.image()));
        disk.mount();
        disk
    }

    /// Creates a tmpfs of `mib` MiB.
    pub(crate) fn memory(mib: u64) -> Self {
        let disk = Self { dir: tempfile::tempdir().expect("a directory") };
        std::fs::create_dir(disk.path()).expect("created");
        let size = format!("size={mib}m");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(disk.path()));
        disk
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn mount(&self) {
        run(Command::new("mount").args(["-o", "loop"]).arg(self.image()).arg(self.path()));
    }

    /// Cuts the power: data that is not on the disk yet is lost, and every later write fails.
    #[expect(unsafe_code, reason = "there is no safe call for this one ioctl")]
    pub(crate) fn cut_power(&self) {
        let dir = File::open(self.path()).expect("a directory");
        // SAFETY: the kernel reads one u32 through the pointer, which lives through the call.
        let done = unsafe { nix::libc::ioctl(dir.as_raw_fd(), EXT4_IOC_SHUTDOWN, &NOLOGFLUSH) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    /// Mounts the file system again, as after a boot.
    pub(crate) fn power_on(self) -> Self {
        umount2(&self.path(), MntFlags::empty()).expect("unmounted");
        self.mount();
        self
    }

    /// Creates a file that takes all free space.
    pub(crate) fn fill(&self) -> PathBuf {
        let path = self.path().join("filler");
        let mut file = File::create(&path).expect("created");
        let piece = vec![1; 4096];
        while std::io::Write::write_all(&mut file, &piece).is_ok() {}
        path
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.path(), MntFlags::MNT_DETACH) {
            eprintln!("{} stays mounted: {error}", self.path().display());
        }
    }
}

fn run(command: &mut Command) {
    let ran = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(ran.status.success(), "{command:?}: {}", String::from_utf8_lossy(&ran.stderr));
}
