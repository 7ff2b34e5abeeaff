//! SFTP server, version 3, with the extensions that OpenSSH's clients use. The helper runs it inside the
//! sandbox, in a process of its own and as the requested user: the kernel of the sandbox decides what may be
//! accessed, at any offset, and nothing is buffered but one packet each way.
//!
//! `wire` has the form of the packets, `files` what they do.

mod files;
mod wire;

use std::{
    ffi::OsStr,
    fs,
    io::{self, BufReader, BufWriter, Read, Write},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::Path,
};

use files::{HANDLES_MAX, Handles, Refusal, path};
use nix::sys::statvfs::Statvfs;
use wire::{Attributes, Code, DATA_BYTES_MAX, Fields, PACKET_BYTES_MAX, Packet, answer, request};

/// Version of the protocol.
const VERSION: u32 = 3;
/// Size of the I/O buffers, in bytes: a packet of most clients.
const BUFFER: usize = 64 * 1024;
/// Extensions, with their versions.
const EXTENSIONS: &[(&str, &str)] = &[
    ("posix-rename@openssh.com", "1"),
    ("statvfs@openssh.com", "2"),
    ("fstatvfs@openssh.com", "2"),
    ("hardlink@openssh.com", "1"),
    ("fsync@openssh.com", "1"),
    ("lsetstat@openssh.com", "1"),
    ("limits@openssh.com", "1"),
];

/// Serves a client until its input ends.
///
/// # Errors
/// When the client breaks the form of the packets, or does not read.
pub fn serve(input: impl Read, output: impl Write) -> io::Result<()> {
    let mut input = BufReader::with_capacity(BUFFER, input);
    let mut output = BufWriter::with_capacity(BUFFER, output);
    let mut handles = Handles::default();
    let mut packet = Vec::new();
    loop {
        // Answers wait as long as the next request is here already.
        if !has_packet(input.buffer()) {
            output.flush()?;
        }
        if !next(&mut input, &mut packet)? {
            return output.flush();
        }
        let answer = handle(&mut handles, &packet).ok_or(io::ErrorKind::InvalidData)?;
        output.write_all(&answer.finish())?;
    }
}

/// True when the bytes begin with a whole packet.
fn has_packet(bytes: &[u8]) -> bool {
    let mut fields = Fields(bytes);
    fields.u32().is_some_and(|length| fields.0.len() >= length as usize)
}

/// Reads the next packet; false at the end of the input.
fn next(input: &mut impl Read, packet: &mut Vec<u8>) -> io::Result<bool> {
    let mut length = [0; 4];
    match input.read_exact(&mut length) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        Err(error) => return Err(error),
    }
    let length = u32::from_be_bytes(length) as usize;
    if length == 0 || length > PACKET_BYTES_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    packet.resize(length, 0);
    input.read_exact(packet)?;
    Ok(true)
}

/// Handles a packet; `None` when it is no request.
fn handle(handles: &mut Handles, packet: &[u8]) -> Option<Packet> {
    let mut fields = Fields(packet);
    let kind = fields.u8()?;
    if kind == request::INIT {
        let version = Packet::new(answer::VERSION).u32(VERSION);
        let add = |packet: Packet, (name, version): &(&str, &str)| {
            packet.string(name.as_bytes()).string(version.as_bytes())
        };
        return Some(EXTENSIONS.iter().fold(version, add));
    }
    let id = fields.u32()?;
    let bad = || Refusal(Code::BadMessage, "the request has another form".to_owned());
    let done = Request { id, handles, fields }.run(kind).unwrap_or_else(|| Err(bad()));
    Some(match done {
        Ok(Answer::Packet(packet)) => packet,
        Ok(Answer::Done) => status(id, Code::Ok, "done"),
        Ok(Answer::End) => status(id, Code::Eof, "end of file"),
        Err(Refusal(code, message)) => status(id, code, &message),
    })
}

fn status(id: u32, code: Code, message: &str) -> Packet {
    let packet = Packet::answer(answer::STATUS, id).u32(code.number());
    packet.string(message.as_bytes()).string(b"en")
}

/// Answer of a request that was carried out.
enum Answer {
    Packet(Packet),
    Done,
    End,
}

impl From<()> for Answer {
    fn from((): ()) -> Self {
        Self::Done
    }
}

/// `None`: the packet ends too early.
type Outcome = Option<files::Result<Answer>>;

struct Request<'a> {
    id: u32,
    handles: &'a mut Handles,
    fields: Fields<'a>,
}

impl Request<'_> {
    fn run(mut self, kind: u8) -> Outcome {
        match kind {
            request::OPEN => {
                let (path, flags) = (path(self.fields.string()?), self.fields.u32()?);
                let new = self.fields.attributes()?;
                self.handle(|handles| handles.open(&path, flags, &new))
            }
            request::OPENDIR => {
                let path = path(self.fields.string()?);
                self.handle(|handles| handles.open_directory(path))
            }
            request::CLOSE => {
                let name = self.fields.string()?;
                Some(self.handles.close(name).map(Answer::from))
            }
            request::READ => self.read(),
            request::WRITE => {
                let (name, offset) = (self.fields.string()?, self.fields.u64()?);
                let bytes = self.fields.string()?;
                Some(self.handles.write(name, offset, bytes).map(Answer::from))
            }
            request::READDIR => {
                let name = self.fields.string()?;
                let names = self.handles.names(name, self.id);
                Some(names.map(|names| names.map_or(Answer::End, Answer::Packet)))
            }
            request::FSTAT => {
                let name = self.fields.string()?;
                let attributes = self.handles.attributes(name);
                Some(attributes.map(|attributes| self.attributes(&attributes)))
            }
            request::FSETSTAT => {
                let (name, to) = (self.fields.string()?, self.fields.attributes()?);
                Some(self.handles.set(name, &to).map(Answer::from))
            }
            request::EXTENDED => self.extended(),
            _ => self.on_path(kind),
        }
    }

    /// Handles the requests about one path or two.
    fn on_path(mut self, kind: u8) -> Outcome {
        let first = path(self.fields.string()?);
        let done = match kind {
            request::LSTAT => return Some(self.describe(fs::symlink_metadata(first))),
            request::STAT => return Some(self.describe(fs::metadata(first))),
            request::REALPATH => {
                let found = files::real_path(&first);
                return Some(found.map(|path| self.name(path.as_os_str())));
            }
            request::READLINK => {
                let found = fs::read_link(first).map_err(Refusal::from);
                return Some(found.map(|path| self.name(path.as_os_str())));
            }
            request::SETSTAT => files::set(&first, &self.fields.attributes()?, true),
            request::MKDIR => files::make_directory(&first, &self.fields.attributes()?),
            request::REMOVE => files::remove(&first),
            request::RMDIR => fs::remove_dir(first).map_err(Refusal::from),
            request::RENAME => files::rename_new(&first, &path(self.fields.string()?)),
            // As OpenSSH has it, against the draft: the target comes first.
            request::SYMLINK => {
                let link = path(self.fields.string()?);
                std::os::unix::fs::symlink(first, link).map_err(Refusal::from)
            }
            _ => Err(unsupported()),
        };
        Some(done.map(Answer::from))
    }

    fn extended(mut self) -> Outcome {
        let name = self.fields.string()?;
        if name == b"limits@openssh.com" {
            let (packet, data) = (PACKET_BYTES_MAX as u64, u64::from(DATA_BYTES_MAX));
            let reply = Packet::answer(answer::EXTENDED_REPLY, self.id).u64(packet);
            let reply = reply.u64(data).u64(data).u64(HANDLES_MAX as u64);
            return Some(Ok(Answer::Packet(reply)));
        }
        let first = self.fields.string()?;
        let done = match name {
            b"posix-rename@openssh.com" => {
                fs::rename(path(first), path(self.fields.string()?)).map_err(Refusal::from)
            }
            b"hardlink@openssh.com" => {
                fs::hard_link(path(first), path(self.fields.string()?)).map_err(Refusal::from)
            }
            b"fsync@openssh.com" => self.handles.sync(first),
            b"lsetstat@openssh.com" => files::set(&path(first), &self.fields.attributes()?, false),
            b"statvfs@openssh.com" => {
                let found = nix::sys::statvfs::statvfs(path(first).as_path());
                return Some(self.space(found.map_err(Refusal::from), &path(first)));
            }
            b"fstatvfs@openssh.com" => {
                let found = self.handles.statvfs(first);
                return Some(self.space(found, Path::new("/")));
            }
            _ => Err(unsupported()),
        };
        Some(done.map(Answer::from))
    }

    fn handle(self, open: impl FnOnce(&mut Handles) -> files::Result<[u8; 4]>) -> Outcome {
        let packet =
            |name: [u8; 4]| Answer::Packet(Packet::answer(answer::HANDLE, self.id).string(&name));
        Some(open(self.handles).map(packet))
    }

    fn read(mut self) -> Outcome {
        let (name, offset) = (self.fields.string()?, self.fields.u64()?);
        let length = self.fields.u32()?;
        Some(self.handles.read(name, offset, length).map(|bytes| match bytes.as_slice() {
            [] if length > 0 => Answer::End,
            bytes => Answer::Packet(Packet::answer(answer::DATA, self.id).string(bytes)),
        }))
    }

    fn attributes(&self, attributes: &Attributes) -> Answer {
        Answer::Packet(Packet::answer(answer::ATTRS, self.id).attributes(attributes))
    }

    fn describe(&self, found: io::Result<fs::Metadata>) -> files::Result<Answer> {
        Ok(self.attributes(&(&found?).into()))
    }

    /// Answers with one name and no attributes.
    fn name(&self, name: &OsStr) -> Answer {
        let name = name.as_bytes();
        let packet = Packet::answer(answer::NAME, self.id).u32(1).string(name).string(name);
        Answer::Packet(packet.attributes(&Attributes::default()))
    }

    fn space(&self, found: files::Result<Statvfs>, at: &Path) -> files::Result<Answer> {
        let found = found?;
        let device = fs::metadata(at).map_or(0, |metadata| metadata.dev());
        let fields = [
            found.block_size(),
            found.fragment_size(),
            found.blocks(),
            found.blocks_free(),
            found.blocks_available(),
            found.files(),
            found.files_free(),
            found.files_available(),
            device,
            // 1: read-only, 2: without set-uid, as the extension has it.
            found.flags().bits() & 3,
            found.name_max(),
        ];
        let reply = Packet::answer(answer::EXTENDED_REPLY, self.id);
        Ok(Answer::Packet(fields.into_iter().fold(reply, Packet::u64)))
    }
}

fn unsupported() -> Refusal {
    Refusal(Code::Unsupported, "the server does not know this request".to_owned())
}

#[cfg(test)]
mod tests;
