//! Limits of glibc's allocator, so that it returns memory.
//!
//! A daemon that waits most of the time should be small after a burst, too. By default glibc keeps
//! an arena for each thread that ever allocated, up to eight for each core, and raises the size
//! from which a block is mapped separately, and so returned when freed, up to 32 MiB.

use nix::libc;

/// Arenas: one for each of the two threads that run the tasks.
const ARENAS: libc::c_int = 2;
/// Bytes from which a block is mapped separately, and free bytes at the heap's end from which they
/// are returned: glibc's own defaults (mallopt(3)), which stay constant once they are set.
const RETURNED_BYTES: libc::c_int = 128 * 1024;

/// Bounds the memory that the allocator keeps. Must be called before there are threads.
#[expect(unsafe_code, reason = "mallopt has no safe wrapper")]
pub fn keep_small() {
    for (parameter, value) in [
        (libc::M_ARENA_MAX, ARENAS),
        (libc::M_MMAP_THRESHOLD, RETURNED_BYTES),
        (libc::M_TRIM_THRESHOLD, RETURNED_BYTES),
    ] {
        // SAFETY: two integers that glibc checks; no other thread runs yet. A refusal only costs
        // memory, so the result is ignored.
        unsafe { libc::mallopt(parameter, value) };
    }
}
