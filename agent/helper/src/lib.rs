//! What a shim and its helper say to each other, over a socket that keeps messages apart
//! (`SOCK_SEQPACKET`). The helper runs among its sandbox's processes and is trusted no more than any
//! of them: whoever reads `FromHelper` takes it for hostile input.
//!
//! Both ends come out of one build, so there are no versions: a shim brings its own helper.

use serde::{Deserialize, Serialize};

/// Descriptor of the socket in the helper.
pub const CHANNEL_FD: i32 = 3;
/// Descriptor of the helper's own image, which it is started from.
pub const IMAGE_FD: i32 = 4;
/// Bytes of a message; an order is larger and travels as a sealed memory file.
pub const MESSAGE_BYTES_MAX: usize = 4096;
/// Bytes of an order: a command's arguments and its environment.
pub const ORDER_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// Bytes of a terminal's new size.
pub const WINDOW_BYTES: usize = 4;
/// What a command exits with when there is no such program.
pub const NO_PROGRAM: u8 = 127;
/// What it exits with when the program cannot be run.
pub const NOT_RUNNABLE: u8 = 126;

/// From the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHelper {
    /// Start what the first descriptor that comes along holds, an [`Order`] in JSON. The other
    /// three are its stdin, stdout and stderr; on a terminal, what is typed, what is written, and
    /// new sizes, [`WINDOW_BYTES`] each.
    Spawn {
        /// The shim's name for it.
        token: u64,
        /// Rows and columns of the terminal that it runs on.
        tty: Option<(u16, u16)>,
        /// Deadline of the start, milliseconds on [`up_ms`]'s clock: what has not become a program
        /// by then is refused as [`Refusal::TooLate`].
        start_by_ms: u64,
    },
    /// Answer with [`FromHelper::Pong`].
    Ping {
        /// The shim's number for it.
        serial: u64,
    },
}

/// A terminal's size as it is passed on: rows, then columns.
pub fn window_bytes((rows, columns): (u16, u16)) -> [u8; WINDOW_BYTES] {
    let ([a, b], [c, d]) = (rows.to_le_bytes(), columns.to_le_bytes());
    [a, b, c, d]
}

/// Rows and columns of a terminal's size.
pub fn window([a, b, c, d]: [u8; WINDOW_BYTES]) -> (u16, u16) {
    (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
}

/// From the helper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHelper {
    /// It is there.
    Ready,
    /// It runs. The kernel tells the receiver its pid.
    Spawned {
        /// The shim's name for it.
        token: u64,
        /// No program could be run: the exit that follows is the helper's own, [`NO_PROGRAM`] or
        /// [`NOT_RUNNABLE`].
        #[serde(default)]
        never_ran: bool,
    },
    /// It does not run, and never did.
    Refused {
        /// The shim's name for it.
        token: u64,
        /// Why.
        why: Refusal,
    },
    /// It has ended.
    Exited {
        /// The shim's name for it.
        token: u64,
        /// Its exit code; 0 when a signal ended it.
        code: u8,
        /// The signal that ended it; 0 if none.
        signal: u8,
    },
    /// The answer to [`ToHelper::Ping`].
    Pong {
        /// The shim's number for it.
        serial: u64,
    },
}

/// Why nothing was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// There is no such user in the sandbox.
    NoUser,
    /// There is no such directory in the sandbox.
    NoCwd,
    /// The sandbox gives no terminal.
    NoTerminal,
    /// The sandbox lets nothing be started: it has too many processes, or too little memory.
    NoProcess,
    /// The deadline of the start had passed.
    TooLate,
}

/// Milliseconds since the host's boot, with those that it slept: `CLOCK_BOOTTIME`, the one clock that
/// a shim and its helper share. It never jumps, and it runs on while the host sleeps and while the
/// sandbox is frozen, so that an order which was held up by either is found to be too late. A
/// container has the host's unless its configuration asks LXC for a time namespace of its own, which
/// PVE never does.
pub fn up_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    let ms = u64::try_from(now.tv_nsec / 1_000_000).unwrap_or_default();
    seconds.saturating_mul(1000).saturating_add(ms)
}

/// Something to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// What.
    pub task: Task,
    /// As whom.
    pub user: User,
    /// Where; the user's home if not said.
    pub cwd: Option<String>,
    /// Set over what the user's entry in /etc/passwd says.
    pub env: Vec<(String, String)>,
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Task {
    /// A program, found by PATH, and its arguments.
    Program(Vec<String>),
    /// An operation on files, by the helper itself.
    Files(FileTask),
}

/// Whom to run it as. Looked up inside: the sandbox's /etc/passwd means nothing outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum User {
    /// By name.
    Name(String),
    /// By number.
    Id(u32),
}

/// An operation on files. What it needs comes on stdin, what it finds goes to stdout; when it fails
/// it exits with 1 and says why as a [`FileError`] in JSON on stderr.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileTask {
    /// Writes files: for each a [`FileHead`] in one line of JSON, then its bytes. Answers with
    /// their number.
    Write,
    /// Reads a regular file: a [`FileEntry`] in one line of JSON, then its bytes.
    Read {
        /// Absolute path.
        path: String,
        /// Bytes to skip.
        offset: u64,
        /// Bytes to read at most; 0 means all.
        length: u64,
    },
    /// Tells what a path is: a [`FileEntry`] in one line of JSON.
    Stat {
        /// Absolute path.
        path: String,
    },
    /// Lists a directory: one [`FileEntry`] a line, by name.
    List {
        /// Absolute path.
        path: String,
        /// Entries at most; one line `{"more":true}` says that there are more.
        limit: u32,
    },
    /// Removes a path. Answers `true` if there was something.
    Remove {
        /// Absolute path.
        path: String,
        /// A directory with all that is in it.
        recursive: bool,
    },
    /// Unpacks the tar archive on stdin into a directory. Answers with the number of entries.
    Unpack {
        /// Absolute path.
        path: String,
    },
    /// Packs a path: a tar archive.
    Pack {
        /// Absolute path.
        path: String,
    },
}

/// What comes before the bytes of a file to write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHead {
    /// Absolute path.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Bytes that follow.
    pub size: u64,
}

/// What a path is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Name in its directory; what is not UTF-8 in it is replaced.
    pub name: String,
    /// What it is.
    pub kind: FileKind,
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of its content, milliseconds since 1970.
    pub modified_ms: i64,
    /// Where a symbolic link points to; empty otherwise.
    pub target: String,
}

/// What a path names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, a socket or a pipe.
    Special,
}

/// Why an operation on files did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileError {
    /// In what way.
    pub kind: FileErrorKind,
    /// A sentence.
    pub message: String,
}

/// In what way an operation on files failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileErrorKind {
    /// There is no such file.
    NotFound,
    /// It is not what the operation needs, or may not be touched.
    Refused,
    /// What was sent is wrong: an archive that leads out of its directory.
    Invalid,
    /// The file system is full.
    Full,
    /// Anything else.
    Failed,
}
