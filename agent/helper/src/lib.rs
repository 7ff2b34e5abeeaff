//! Messages between a shim and its helper, over a `SOCK_SEQPACKET` socket, which keeps message
//! boundaries. The helper runs among the processes of its sandbox and is trusted no more than they
//! are: the shim treats `FromHelper` as hostile input.
//!
//! Both ends come from one build, so the protocol has no versions: a shim brings its own helper.

use std::{fmt, net::SocketAddr};

use serde::{Deserialize, Serialize};

/// Descriptor of the socket in the helper.
pub const CHANNEL_FD: i32 = 3;
/// Descriptor of the helper's executable image, which the helper is started from.
pub const IMAGE_FD: i32 = 4;
/// Largest message, in bytes. An order can be larger and travels as a sealed memory file.
pub const MESSAGE_BYTES_MAX: usize = 4096;
/// Largest order, in bytes: the arguments of a command and its environment.
pub const ORDER_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// Length of an encoded terminal size, in bytes.
pub const WINDOW_BYTES: usize = 4;
/// Exit code of a command whose program does not exist.
pub const NO_PROGRAM: u8 = 127;
/// Exit code of a command whose program cannot be run.
pub const NOT_RUNNABLE: u8 = 126;

/// Message from the shim to the helper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHelper {
    /// Start the [`Order`] that the first attached descriptor holds as JSON. The other three
    /// descriptors are its stdin, stdout and stderr; on a terminal they are keyboard input, output,
    /// and new sizes of [`WINDOW_BYTES`] each.
    Spawn {
        /// Number by which the shim names the command.
        token: u64,
        /// Rows and columns of the terminal; `None` runs the command on pipes.
        tty: Option<(u16, u16)>,
        /// Deadline of the start, in milliseconds of [`up_ms`]: a child that runs no program by
        /// then is refused as [`Refusal::TooLate`].
        start_by_ms: u64,
    },
    /// Answer with [`FromHelper::Pong`].
    Ping {
        /// Number by which the shim names the ping.
        serial: u64,
    },
}

/// Encodes a terminal size: rows, then columns, both little endian.
pub fn window_bytes((rows, columns): (u16, u16)) -> [u8; WINDOW_BYTES] {
    let ([a, b], [c, d]) = (rows.to_le_bytes(), columns.to_le_bytes());
    [a, b, c, d]
}

/// Decodes the rows and columns of a terminal size.
pub fn window([a, b, c, d]: [u8; WINDOW_BYTES]) -> (u16, u16) {
    (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
}

/// Message from the helper to the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHelper {
    /// The helper has started.
    Ready,
    /// The command runs. The kernel passes its pid to the receiver.
    Spawned {
        /// Number by which the shim names the command.
        token: u64,
        /// True when no program could be run: the exit that follows is the helper's own,
        /// [`NO_PROGRAM`] or [`NOT_RUNNABLE`].
        #[serde(default)]
        never_ran: bool,
    },
    /// The command was not started and will not be.
    Refused {
        /// Number by which the shim names the command.
        token: u64,
        why: Refusal,
    },
    /// The command has ended.
    Exited {
        /// Number by which the shim names the command.
        token: u64,
        /// Exit code; 0 when a signal ended the command.
        code: u8,
        /// Signal that ended the command; 0 if none.
        signal: u8,
    },
    Pong {
        serial: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    NoUser,
    NoCwd,
    /// The sandbox provides no terminal.
    NoTerminal,
    /// The sandbox has too many processes or too little memory to start another one.
    NoProcess,
    /// The deadline of the start has passed.
    TooLate,
    /// Nothing accepts connections at the target of a forward.
    NotListening,
    /// The target of a forward is no server of streams, or may not be used.
    NotConnected,
    /// Another program listens on the port.
    PortTaken,
    /// The connection was taken already, was closed, or its listener has ended.
    NoConnection,
}

/// Milliseconds since the host's boot, time asleep included: `CLOCK_BOOTTIME`, the one clock that a
/// shim and its helper share. It never jumps and keeps running while the host sleeps or the sandbox
/// is frozen, so an order that either delayed is found to be too late. A container has the host's
/// clock unless its configuration asks LXC for its own time namespace, which PVE never does.
pub fn up_ms() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    let now = now.map(std::time::Duration::from).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Command that the helper is to start.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    pub task: Task,
    /// User that the task runs as.
    pub user: User,
    /// Working directory; `None` means the user's home.
    pub cwd: Option<String>,
    /// Environment variables; they override those derived from the user's entry in /etc/passwd.
    pub env: Vec<(String, String)>,
}

/// Variables are not shown: they may be secrets.
impl fmt::Debug for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { task, user, cwd: _, env } = self;
        write!(f, "Order({task:?}, {user:?}, {} variables)", env.len())
    }
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Task {
    /// A program, found by PATH, and its arguments.
    Program(Vec<String>),
    /// A file operation, which the helper does itself.
    Files(FileTask),
    /// An SFTP server on stdin and stdout, which the helper is itself.
    Sftp,
    /// A byte stream to a server, which the helper carries itself.
    Forward(ForwardTask),
}

/// Arguments are not shown: they may be secrets.
impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Program(argv) => write!(f, "Program({} words)", argv.len()),
            Self::Files(task) => write!(f, "Files({task:?})"),
            Self::Sftp => f.write_str("Sftp"),
            Self::Forward(task) => write!(f, "Forward({task:?})"),
        }
    }
}

/// User that a task runs as, looked up inside the sandbox: its /etc/passwd means nothing outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum User {
    Name(String),
    Id(u32),
}

/// File operation. It reads its input from stdin and writes its result to stdout; when it fails, it
/// exits with 1 and writes a [`FileError`] as JSON to stderr.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileTask {
    /// Writes files. The input has for each file a [`FileHead`] in one line of JSON, then its
    /// bytes. Answers with the number of files.
    Write,
    /// Reads a regular file: a [`FileEntry`] in one line of JSON, then its bytes.
    Read {
        /// Absolute path.
        path: String,
        /// Bytes to skip.
        offset: u64,
        /// Most bytes to read; 0 means all.
        length: u64,
    },
    /// Describes a path: a [`FileEntry`] in one line of JSON.
    Stat {
        /// Absolute path.
        path: String,
    },
    /// Lists a directory: one [`FileEntry`] a line, by name.
    List {
        /// Absolute path.
        path: String,
        /// Most entries to list; a last line, [`More`], says that there are more.
        limit: u32,
        /// Lists only entries after this one; empty for all. The name in hexadecimal digits, since it
        /// may have any bytes.
        #[serde(default)]
        after: String,
    },
    /// Removes a path. Answers `true` if it existed.
    Remove {
        /// Absolute path.
        path: String,
        /// Removes a directory with all its contents.
        recursive: bool,
    },
    /// Unpacks the tar archive on stdin into a directory. Answers with the number of entries.
    Unpack {
        /// Absolute path.
        path: String,
        /// Owner of everything that is unpacked: `USER` or `USER:GROUP`, by name or number. Empty:
        /// as `keep_existing` says.
        #[serde(default)]
        owner: String,
        /// Keeps the owner and the permission bits of what is written over; what is new belongs to
        /// the user. False: all as in the archive, with its owners where root unpacks.
        #[serde(default)]
        keep_existing: bool,
    },
    /// Packs a path: a tar archive.
    Pack {
        /// Absolute path; a link at its end is packed as a link, unless a slash follows.
        path: String,
    },
}

/// Byte stream inside the sandbox: bytes of stdin go to a server, and what it writes to stdout. The task
/// runs once it is connected, and ends with 0 when both directions have ended, or with 1 when the server has
/// broken the connection off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ForwardTask {
    /// Connects to the first of these addresses that accepts, each a loopback address or the sandbox's own.
    Tcp(Vec<SocketAddr>),
    /// Connects to the unix socket at this absolute path.
    Unix(String),
    /// Listens on a port of 127.0.0.1. Writes the number of each connection to stdout, in 8 bytes, little
    /// endian.
    Listen {
        port: u16,
        /// Name of the listener, which nobody can guess.
        name: String,
    },
    /// Takes a connection of a listener.
    Accepted {
        /// Name of the listener.
        name: String,
        /// Number of the connection.
        connection: u64,
    },
}

/// Last line of a list that has more entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct More {
    /// True.
    pub more: bool,
    /// Last entry that was listed, for the next list.
    #[serde(default)]
    pub after: String,
}

/// Header that precedes the bytes of a file to write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHead {
    /// Absolute path.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// A file that is written over keeps its permission bits.
    #[serde(default)]
    pub keep_mode: bool,
    /// Number of bytes that follow.
    pub size: u64,
}

/// Description of a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Name in its directory; invalid UTF-8 is replaced.
    pub name: String,
    pub kind: FileKind,
    /// Size in bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Uid of the owner.
    pub uid: u32,
    /// Gid of the group.
    pub gid: u32,
    /// Last change of the content, in milliseconds since 1970.
    pub modified_ms: i64,
    /// Target of a symbolic link; empty otherwise.
    pub target: String,
}

/// Type of the file at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    File,
    Directory,
    Symlink,
    /// A device, a socket or a pipe.
    Special,
}

/// Error of a file operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileError {
    pub kind: FileErrorKind,
    /// Message for people, one sentence.
    pub message: String,
    /// Number of files that were written before: the first ones of a [`FileTask::Write`].
    #[serde(default)]
    pub written: Option<u32>,
}

/// Class of a file operation's error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileErrorKind {
    /// No file exists at the path.
    NotFound,
    /// The file has the wrong type, or permissions forbid the operation.
    Refused,
    /// The input is invalid: an archive that leads out of its directory.
    Invalid,
    /// The file system is full.
    Full,
    Failed,
}
