//! Checks of a caller's command. The controller and the agent both use them.

use std::{ops::RangeInclusive, time::Duration};

use bytes::Bytes;

use crate::{duration, id::Invalid, sandbox::v1::WindowSize};

/// Most bytes of stdin, or of a file, in one message.
pub const CHUNK_BYTES_MAX: usize = 256 * 1024;
/// Most bytes of data in one message to an agent, which holds a few messages of each stream: those of a caller are
/// cut. As many as a stream has of its window there, and as a pipe holds.
pub const PIECE_BYTES_MAX: usize = 64 * 1024;
/// Most arguments of a command.
const ARGUMENTS_MAX: usize = 4096;
/// Most bytes of an argument, or of a line for the shell: the kernel takes 128 KiB with the NUL.
const ARGUMENT_BYTES_MAX: usize = 128 * 1024 - 1;
/// Most bytes of all arguments. The kernel takes a quarter of the stack's limit, usually 2 MiB, and
/// the environment counts too.
const ARGUMENTS_BYTES_MAX: usize = 1024 * 1024;
/// Most bytes of a path: the kernel takes 4 KiB with the NUL.
const PATH_BYTES_MAX: usize = 4095;
/// Most bytes of a user's name.
const USER_BYTES_MAX: usize = 64;
/// Most bytes of the name of an owner of files.
const NAME_BYTES_MAX: usize = 32;
/// Most characters of an exec_id.
const EXEC_ID_MAX: usize = 64;
/// Allowed numbers of rows and of columns of a terminal.
const SIDE: RangeInclusive<u32> = 1..=1000;
/// Numbers of the signals that callers can send.
const SIGNALS: RangeInclusive<u32> = 1..=31;

/// Checks an exec_id, the caller's name of a run: 1 to 64 characters of `[A-Za-z0-9._-]`.
///
/// # Errors
/// When it has another form. The error names `field`.
pub fn check_exec_id(field: &'static str, exec_id: &str) -> Result<(), Invalid> {
    let of_alphabet = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if exec_id.is_empty() || exec_id.len() > EXEC_ID_MAX || !exec_id.bytes().all(of_alphabet) {
        return Err(Invalid::new(field, "must be 1 to 64 characters of A-Z a-z 0-9 . _ -"));
    }
    Ok(())
}

/// Reads the timeout of a command; zero or unset is none.
///
/// # Errors
/// When it is negative. The error names `field`.
pub fn timeout(
    field: &'static str,
    asked: Option<prost_types::Duration>,
) -> Result<Option<Duration>, Invalid> {
    Ok(duration::check(field, asked)?.filter(|asked| !asked.is_zero()))
}

/// Checks the number of bytes in one message.
///
/// # Errors
/// When there are more than [`CHUNK_BYTES_MAX`]. The error names `field`.
pub fn check_chunk(field: &'static str, bytes: &[u8]) -> Result<(), Invalid> {
    if bytes.len() > CHUNK_BYTES_MAX {
        return Err(Invalid::new(field, "must be at most 256 KiB in one message"));
    }
    Ok(())
}

/// Cuts data into pieces of at most [`PIECE_BYTES_MAX`], without a copy. No bytes are no piece.
pub fn pieces(mut data: Bytes) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || {
        let piece = data.split_to(data.len().min(PIECE_BYTES_MAX));
        (!piece.is_empty()).then_some(piece)
    })
}

/// Checks the size of a terminal.
///
/// # Errors
/// When the rows or the columns are not 1 to 1000.
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

/// Checks the arguments of a command, or the one line for a shell.
///
/// # Errors
/// When there is no program, or when the kernel could not start a process with these arguments. The
/// error names `field`.
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
/// When it is not absolute, contains a NUL, or is longer than 4095 bytes. The error names `field`.
pub fn check_path(field: &'static str, path: &str) -> Result<(), Invalid> {
    if !path.starts_with('/') || path.contains('\0') || path.len() > PATH_BYTES_MAX {
        let why = "must be absolute, without a NUL, and at most 4095 bytes";
        return Err(Invalid::new(field, why));
    }
    Ok(())
}

/// Checks the length of a user's name or number. The agent checks its form.
///
/// # Errors
/// When it is longer than 64 bytes or contains a NUL.
pub fn check_user(user: &str) -> Result<(), Invalid> {
    if user.len() > USER_BYTES_MAX || user.contains('\0') {
        return Err(Invalid::new("user", "must be a name or a number of at most 64 characters"));
    }
    Ok(())
}

/// Checks an owner of files: empty, `USER` or `USER:GROUP`, each by name or number.
///
/// # Errors
/// When it has another form. The error names `field`.
pub fn check_owner(field: &'static str, owner: &str) -> Result<(), Invalid> {
    let (user, group) = owner.split_once(':').unwrap_or((owner, "0"));
    let valid = owner.is_empty() || is_owner(user) && is_owner(group);
    if !valid {
        let why = "must be USER or USER:GROUP, each a name of at most 32 characters or an id";
        return Err(Invalid::new(field, why));
    }
    Ok(())
}

fn is_owner(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    match text.bytes().next() {
        // The largest number means "nobody in particular" to the kernel.
        Some(b'0'..=b'9') => text.parse::<u32>().is_ok_and(|id| id != u32::MAX),
        Some(first) => {
            (first.is_ascii_alphabetic() || first == b'_')
                && text.len() <= NAME_BYTES_MAX
                && text.bytes().all(plain)
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_that_cannot_start_a_process_are_refused() {
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
    fn pieces_are_small_and_nothing_is_cut_into_none() {
        let sizes = |bytes: usize| pieces(vec![0; bytes].into()).map(|piece| piece.len());
        assert_eq!(sizes(0).next(), None);
        assert!(sizes(1).eq([1]) && sizes(PIECE_BYTES_MAX).eq([PIECE_BYTES_MAX]));
        let large = sizes(2 * PIECE_BYTES_MAX + 3);
        assert!(large.eq([PIECE_BYTES_MAX, PIECE_BYTES_MAX, 3]));
    }

    #[test]
    fn timeout_of_zero_is_none_and_none_is_too_long() {
        let of = |seconds, nanos| timeout("t", Some(prost_types::Duration { seconds, nanos }));
        assert_eq!(timeout("t", None), Ok(None));
        assert_eq!(of(0, 0), Ok(None));
        assert_eq!(of(0, 1), Ok(Some(Duration::from_nanos(1))));
        assert_eq!(of(i64::MAX, 0), Ok(Some(Duration::from_secs(i64::MAX.unsigned_abs()))));
        of(-1, 0).expect_err("negative");
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

    #[test]
    fn owners_are_names_or_numbers() {
        for good in ["", "root", "www-data:adm", "0:0", "70000", "4294967294:_x"] {
            check_owner("owner", good).expect(good);
        }
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        for bad in [":", "root:", ":adm", "4294967295", "-1", "1x", "a b", "a:b:c", long.as_str()] {
            assert!(check_owner("owner", bad).is_err(), "{bad}");
        }
    }
}
