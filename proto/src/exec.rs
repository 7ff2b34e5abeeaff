//! Checks of a caller's command. Controller and agent both use them.

use std::{ops::RangeInclusive, time::Duration};

use crate::{id::Invalid, sandbox::v1::WindowSize};

/// Bytes of stdin, or of a file, in one message at most.
pub const CHUNK_BYTES_MAX: usize = 256 * 1024;
/// Longest time that a command may run.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Arguments of a command at most.
const ARGUMENTS_MAX: usize = 4096;
/// Bytes of an argument, or of a line for the shell, at most: the kernel takes 128 KiB with the
/// NUL.
const ARGUMENT_BYTES_MAX: usize = 128 * 1024 - 1;
/// Bytes of all arguments at most. The kernel takes a quarter of the stack's limit, 2 MiB as a
/// rule, and the environment counts too.
const ARGUMENTS_BYTES_MAX: usize = 1024 * 1024;
/// Bytes of a path at most: the kernel takes 4 KiB with the NUL.
const PATH_BYTES_MAX: usize = 4095;
/// Bytes of a user's name at most.
const USER_BYTES_MAX: usize = 64;
/// Characters of an exec_id at most.
const EXEC_ID_MAX: usize = 64;
/// Rows, and columns, of a terminal.
const SIDE: RangeInclusive<u32> = 1..=1000;
/// Signals that callers can send.
const SIGNALS: RangeInclusive<u32> = 1..=31;

/// Checks an exec_id, the caller's name of a run: 1 to 64 characters of `[A-Za-z0-9._-]`.
///
/// # Errors
/// Names the field when it is not.
pub fn check_exec_id(field: &'static str, exec_id: &str) -> Result<(), Invalid> {
    let of_alphabet = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if exec_id.is_empty() || exec_id.len() > EXEC_ID_MAX || !exec_id.bytes().all(of_alphabet) {
        return Err(Invalid::new(field, "must be 1 to 64 characters of A-Z a-z 0-9 . _ -"));
    }
    Ok(())
}

/// Checks the bytes of one message.
///
/// # Errors
/// Names the field when they are more than [`CHUNK_BYTES_MAX`].
pub fn check_chunk(field: &'static str, bytes: &[u8]) -> Result<(), Invalid> {
    if bytes.len() > CHUNK_BYTES_MAX {
        return Err(Invalid::new(field, "must be at most 256 KiB in one message"));
    }
    Ok(())
}

/// Checks the size of a terminal.
///
/// # Errors
/// When a side is not 1 to 1000.
pub fn check_window(window: &WindowSize) -> Result<(), Invalid> {
    if !(SIDE.contains(&window.rows) && SIDE.contains(&window.cols)) {
        return Err(Invalid::new("window", "must be 1 to 1000 rows and columns"));
    }
    Ok(())
}

/// Checks the number of a signal.
///
/// # Errors
/// When it is not 1 to 31.
pub fn check_signal(signal: u32) -> Result<(), Invalid> {
    if !SIGNALS.contains(&signal) {
        return Err(Invalid::new("signal", "must be 1 to 31"));
    }
    Ok(())
}

/// Checks the arguments of a command, or the one line of a shell.
///
/// # Errors
/// Names the field when there is no program, or when no process could start with these arguments.
pub fn check_command(field: &'static str, arguments: &[String]) -> Result<(), Invalid> {
    if arguments.first().is_none_or(String::is_empty) {
        return Err(Invalid::new(field, "must not be empty"));
    }
    if arguments.iter().any(|argument| argument.contains('\0')) {
        return Err(Invalid::new(field, "must not hold a NUL"));
    }
    let bytes: usize = arguments.iter().map(|argument| argument.len() + 1).sum();
    if arguments.len() > ARGUMENTS_MAX
        || bytes > ARGUMENTS_BYTES_MAX
        || arguments.iter().any(|argument| argument.len() > ARGUMENT_BYTES_MAX)
    {
        let why = "must be at most 4096 arguments, 128 KiB each and 1 MiB in all";
        return Err(Invalid::new(field, why));
    }
    Ok(())
}

/// Checks a path in a sandbox.
///
/// # Errors
/// Names the field when it is not absolute, holds a NUL, or is longer than 4095 bytes.
pub fn check_path(field: &'static str, path: &str) -> Result<(), Invalid> {
    if !path.starts_with('/') || path.contains('\0') || path.len() > PATH_BYTES_MAX {
        let why = "must be absolute, without a NUL, and at most 4095 bytes";
        return Err(Invalid::new(field, why));
    }
    Ok(())
}

/// Checks the length of a user's name or number in a sandbox.
///
/// # Errors
/// When it is longer than 64 bytes or holds a NUL.
pub fn check_user(user: &str) -> Result<(), Invalid> {
    if user.len() > USER_BYTES_MAX || user.contains('\0') {
        return Err(Invalid::new("user", "must be a name or a number of at most 64 characters"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_arguments_that_no_process_can_be_started_with() {
        let check = |arguments: &[&str]| {
            let arguments: Vec<_> = arguments.iter().map(ToString::to_string).collect();
            check_command("argv", &arguments)
        };
        for good in [&["true"][..], &["a", "", "b\nc"]] {
            assert_eq!(check(good), Ok(()));
        }
        let long = "x".repeat(ARGUMENT_BYTES_MAX + 1);
        for bad in [&[][..], &[""], &["a\0b"], &["a", &long]] {
            check(bad).expect_err("refused");
        }
        check_command("argv", &vec!["a".to_owned(); ARGUMENTS_MAX + 1]).expect_err("too many");
        check_command("argv", &vec!["x".repeat(100_000); 20]).expect_err("too long");
    }

    #[test]
    fn paths_are_absolute_and_short() {
        for good in ["/", "/a", "/a b/\u{e9}\n", "/../a"] {
            check_path("path", good).expect(good);
        }
        let long = format!("/{}", "a".repeat(PATH_BYTES_MAX));
        for bad in ["", "a", "./a", "/a\0b", long.as_str()] {
            assert!(check_path("path", bad).is_err(), "{bad}");
        }
    }
}
