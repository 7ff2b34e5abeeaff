//! Packets of SFTP version 3: numbers, strings and attributes. Pure.

use std::{
    fs::Metadata,
    os::unix::fs::{FileTypeExt, MetadataExt},
};

/// Largest packet that is read, in bytes, without its length: what OpenSSH takes.
pub(super) const PACKET_BYTES_MAX: usize = 256 * 1024;
/// Most bytes of a file in one packet.
pub(super) const DATA_BYTES_MAX: u32 = 255 * 1024;

/// Numbers of the requests.
pub(super) mod request {
    pub(crate) const INIT: u8 = 1;
    pub(crate) const OPEN: u8 = 3;
    pub(crate) const CLOSE: u8 = 4;
    pub(crate) const READ: u8 = 5;
    pub(crate) const WRITE: u8 = 6;
    pub(crate) const LSTAT: u8 = 7;
    pub(crate) const FSTAT: u8 = 8;
    pub(crate) const SETSTAT: u8 = 9;
    pub(crate) const FSETSTAT: u8 = 10;
    pub(crate) const OPENDIR: u8 = 11;
    pub(crate) const READDIR: u8 = 12;
    pub(crate) const REMOVE: u8 = 13;
    pub(crate) const MKDIR: u8 = 14;
    pub(crate) const RMDIR: u8 = 15;
    pub(crate) const REALPATH: u8 = 16;
    pub(crate) const STAT: u8 = 17;
    pub(crate) const RENAME: u8 = 18;
    pub(crate) const READLINK: u8 = 19;
    pub(crate) const SYMLINK: u8 = 20;
    pub(crate) const EXTENDED: u8 = 200;
}

/// Numbers of the answers.
pub(super) mod answer {
    pub(crate) const VERSION: u8 = 2;
    pub(crate) const STATUS: u8 = 101;
    pub(crate) const HANDLE: u8 = 102;
    pub(crate) const DATA: u8 = 103;
    pub(crate) const NAME: u8 = 104;
    pub(crate) const ATTRS: u8 = 105;
    pub(crate) const EXTENDED_REPLY: u8 = 201;
}

/// Code of a status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    Ok = 0,
    Eof = 1,
    NoSuchFile = 2,
    PermissionDenied = 3,
    Failure = 4,
    BadMessage = 5,
    Unsupported = 8,
}

impl Code {
    /// Returns the number of the code.
    pub(super) const fn number(self) -> u32 {
        self as u32
    }
}

const SIZE: u32 = 1;
const OWNER: u32 = 2;
const PERMISSIONS: u32 = 4;
const TIMES: u32 = 8;
const EXTENSIONS: u32 = 0x8000_0000;

/// Attributes of a file; what is `None` is not changed, or not known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) size: Option<u64>,
    /// User and group.
    pub(super) owner: Option<(u32, u32)>,
    /// Type of the file and its permission bits.
    pub(super) mode: Option<u32>,
    /// Last access and last change of the content, in seconds since 1970.
    pub(super) times: Option<(u32, u32)>,
}

impl From<&Metadata> for Attributes {
    fn from(metadata: &Metadata) -> Self {
        // Version 3 has 32 bits for a time.
        let time = |seconds: i64| u32::try_from(seconds.max(0)).unwrap_or(u32::MAX);
        Self {
            size: Some(metadata.len()),
            owner: Some((metadata.uid(), metadata.gid())),
            mode: Some(metadata.mode()),
            times: Some((time(metadata.atime()), time(metadata.mtime()))),
        }
    }
}

/// Reads the fields of a packet in order. `None` when it ends too early.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.bytes(1)?.first().copied()
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.bytes(4)?.try_into().ok()?))
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.bytes(8)?.try_into().ok()?))
    }

    pub(super) fn string(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.u32()?).ok()?;
        self.bytes(length)
    }

    pub(super) fn attributes(&mut self) -> Option<Attributes> {
        let flags = self.u32()?;
        let mut attributes = Attributes::default();
        if flags & SIZE != 0 {
            attributes.size = Some(self.u64()?);
        }
        if flags & OWNER != 0 {
            attributes.owner = Some((self.u32()?, self.u32()?));
        }
        if flags & PERMISSIONS != 0 {
            attributes.mode = Some(self.u32()?);
        }
        if flags & TIMES != 0 {
            attributes.times = Some((self.u32()?, self.u32()?));
        }
        if flags & EXTENSIONS != 0 {
            for _ in 0..self.u32()? {
                self.string()?;
                self.string()?;
            }
        }
        Some(attributes)
    }
}

/// Builds one packet.
#[derive(Debug)]
pub(super) struct Packet(Vec<u8>);

impl Packet {
    /// Begins a packet; its length is filled in at the end.
    pub(super) fn new(kind: u8) -> Self {
        Self(vec![0, 0, 0, 0, kind])
    }

    /// Begins the answer of a request.
    pub(super) fn answer(kind: u8, id: u32) -> Self {
        Self::new(kind).u32(id)
    }

    #[must_use]
    pub(super) fn u32(mut self, number: u32) -> Self {
        self.0.extend(number.to_be_bytes());
        self
    }

    #[must_use]
    pub(super) fn u64(mut self, number: u64) -> Self {
        self.0.extend(number.to_be_bytes());
        self
    }

    #[must_use]
    pub(super) fn string(mut self, bytes: &[u8]) -> Self {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.0.extend(length.to_be_bytes());
        self.0.extend(bytes);
        self
    }

    #[must_use]
    pub(super) fn attributes(mut self, attributes: &Attributes) -> Self {
        let Attributes { size, owner, mode, times } = attributes;
        let flag = |is_there: bool, flag: u32| if is_there { flag } else { 0 };
        let flags = flag(size.is_some(), SIZE)
            | flag(owner.is_some(), OWNER)
            | flag(mode.is_some(), PERMISSIONS)
            | flag(times.is_some(), TIMES);
        self = self.u32(flags);
        if let Some(size) = size {
            self = self.u64(*size);
        }
        if let Some((uid, gid)) = owner {
            self = self.u32(*uid).u32(*gid);
        }
        if let Some(mode) = mode {
            self = self.u32(*mode);
        }
        if let Some((accessed, modified)) = times {
            self = self.u32(*accessed).u32(*modified);
        }
        self
    }

    /// Appends another packet's fields.
    #[must_use]
    pub(super) fn append(mut self, fields: &[u8]) -> Self {
        self.0.extend(fields);
        self
    }

    /// Returns the fields after the kind.
    pub(super) fn fields(&self) -> &[u8] {
        &self.0[5..]
    }

    /// Returns the bytes to send.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len() - 4).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_be_bytes());
        self.0
    }
}

/// Describes a file in a line as `ls -l` does; OpenSSH's `sftp` shows it as it is.
pub(super) fn long_name(name: &[u8], metadata: &Metadata) -> Vec<u8> {
    let kind = metadata.file_type();
    let letter = match () {
        () if kind.is_dir() => 'd',
        () if kind.is_symlink() => 'l',
        () if kind.is_fifo() => 'p',
        () if kind.is_socket() => 's',
        () if kind.is_char_device() => 'c',
        () if kind.is_block_device() => 'b',
        () => '-',
    };
    let mode = metadata.mode();
    let bits: String = (0..9)
        .map(|bit| match (mode >> (8 - bit) & 1, bit % 3) {
            (0, _) => '-',
            (_, 0) => 'r',
            (_, 1) => 'w',
            (_, _) => 'x',
        })
        .collect();
    let (links, uid, gid, size) =
        (metadata.nlink(), metadata.uid(), metadata.gid(), metadata.len());
    let day = day(metadata.mtime().div_euclid(24 * 3600));
    let mut line =
        format!("{letter}{bits} {links:4} {uid:<8} {gid:<8} {size:8} {day} ").into_bytes();
    line.extend(name);
    line
}

/// Formats a day, counted from 1970-01-01, in the calendar of today.
fn day(days: i64) -> String {
    // Counted from 0000-03-01: a leap day is the last of its year, and each 400 years are alike.
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_they_are_written() {
        let all = Attributes {
            size: Some(1 << 40),
            owner: Some((1, 2)),
            mode: Some(0o100_644),
            times: Some((3, 4)),
        };
        for attributes in [all, Attributes::default(), Attributes { owner: None, ..all }] {
            let packet = Packet::new(0).attributes(&attributes);
            let mut fields = Fields(packet.fields());
            assert_eq!(fields.attributes(), Some(attributes));
            assert!(fields.0.is_empty());
            let cut = &packet.fields()[..packet.fields().len() - 1];
            assert_eq!(Fields(cut).attributes(), None);
        }
    }

    #[test]
    fn days_are_those_of_the_calendar() {
        for (days, text) in [
            (0, "1970-01-01"),
            (-1, "1969-12-31"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (20_787, "2026-11-30"),
        ] {
            assert_eq!(day(days), text);
        }
    }

    #[test]
    fn length_beyond_the_packet_is_refused() {
        assert_eq!(Fields(&[0, 0, 0, 9, 1]).string(), None);
        assert_eq!(Fields(&[0xff, 0xff, 0xff, 0xff]).string(), None);
    }
}
