//! Requests as bytes, and OpenSSH's own client over the server as a process.

#![expect(clippy::disallowed_methods, reason = "OpenSSH's client is a process")]

use std::{
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Command, Stdio},
};

use super::*;

/// Requests of one session, with numbers from 1 on.
#[derive(Default)]
struct Session(Vec<u8>, u32);

impl Session {
    fn ask(&mut self, kind: u8, fields: impl FnOnce(Packet) -> Packet) -> &mut Self {
        self.1 += 1;
        self.0.extend(fields(Packet::answer(kind, self.1)).finish());
        self
    }

    /// Returns the answers: kind, and fields after the number of the request.
    fn answers(&self) -> Vec<(u8, Vec<u8>)> {
        let mut output = Vec::new();
        serve(self.0.as_slice(), &mut output).expect("a whole session");
        let (mut rest, mut answers) = (output.as_slice(), Vec::new());
        while !rest.is_empty() {
            let packet = Fields(rest).string().expect("a whole packet");
            answers.push((packet[0], packet[5..].to_vec()));
            rest = &rest[4 + packet.len()..];
        }
        answers
    }
}

fn code((kind, fields): &(u8, Vec<u8>)) -> u32 {
    assert_eq!(*kind, answer::STATUS);
    Fields(fields).u32().expect("a code")
}

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

const NONE: Attributes = Attributes { size: None, owner: None, mode: None, times: None };
/// First handle of a session.
const FIRST: [u8; 4] = [0; 4];

#[test]
fn parts_of_a_file_are_written_and_read_at_any_offset() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("file");
    let new = Attributes { mode: Some(0o600), ..NONE };
    let mut session = Session::default();
    // Read, write, create.
    session
        .ask(request::OPEN, |p| p.string(bytes(&path)).u32(1 | 2 | 8).attributes(&new))
        .ask(request::WRITE, |p| p.string(&FIRST).u64(6).string(b"world"))
        .ask(request::WRITE, |p| p.string(&FIRST).u64(0).string(b"hello "))
        .ask(request::READ, |p| p.string(&FIRST).u64(4).u32(3))
        .ask(request::READ, |p| p.string(&FIRST).u64(11).u32(3))
        .ask(request::FSETSTAT, |p| {
            p.string(&FIRST).attributes(&Attributes { size: Some(5), times: Some((7, 8)), ..NONE })
        })
        .ask(request::FSTAT, |p| p.string(&FIRST))
        .ask(request::CLOSE, |p| p.string(&FIRST))
        .ask(request::CLOSE, |p| p.string(&FIRST));
    let answers = session.answers();
    assert_eq!(answers[0], (answer::HANDLE, [&[0, 0, 0, 4][..], &FIRST].concat()));
    assert_eq!((code(&answers[1]), code(&answers[2])), (0, 0));
    assert_eq!(answers[3], (answer::DATA, b"\0\0\0\x03o w".to_vec()));
    assert_eq!(code(&answers[4]), Code::Eof.number());
    assert_eq!(code(&answers[5]), 0);
    let attributes = Fields(&answers[6].1).attributes().expect("attributes");
    assert_eq!((attributes.size, attributes.times), (Some(5), Some((7, 8))));
    assert_eq!(attributes.mode, Some(0o100_600));
    assert_eq!((code(&answers[7]), code(&answers[8])), (0, Code::Failure.number()));
    assert_eq!(fs::read(&path).expect("written"), b"hello");
}

#[test]
fn what_is_no_regular_file_is_refused_without_a_wait() {
    let dir = tempfile::tempdir().expect("a directory");
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("made");
    let mut session = Session::default();
    for (path, flags) in [(fifo.as_path(), 1), (Path::new("/dev/zero"), 1), (dir.path(), 1)] {
        session.ask(request::OPEN, |p| p.string(bytes(path)).u32(flags).attributes(&NONE));
    }
    session.ask(request::OPEN, |p| p.string(b"/nowhere/x").u32(1).attributes(&NONE));
    let codes: Vec<_> = session.answers().iter().map(code).collect();
    assert_eq!(codes, [4, 4, 4, Code::NoSuchFile.number()]);
}

#[test]
fn rename_replaces_only_where_the_request_says_so() {
    let dir = tempfile::tempdir().expect("a directory");
    let [a, b] = ["a", "b"].map(|name| dir.path().join(name));
    fs::write(&a, "a").expect("written");
    fs::write(&b, "b").expect("written");
    let mut session = Session::default();
    session
        .ask(request::RENAME, |p| p.string(bytes(&a)).string(bytes(&b)))
        .ask(request::EXTENDED, |p| {
            p.string(b"posix-rename@openssh.com").string(bytes(&a)).string(bytes(&b))
        })
        .ask(request::SYMLINK, |p| p.string(b"b").string(bytes(&a)))
        .ask(request::READLINK, |p| p.string(bytes(&a)))
        .ask(99, |p| p.string(b""))
        .ask(request::OPEN, |p| p.string(b"cut"));
    let answers = session.answers();
    assert_eq!((code(&answers[0]), code(&answers[1]), code(&answers[2])), (4, 0, 0));
    assert_eq!(fs::read(&b).expect("there"), b"a");
    assert_eq!(fs::read_link(&a).expect("a link"), Path::new("b"));
    assert_eq!(answers[3].0, answer::NAME);
    assert_eq!((code(&answers[4]), code(&answers[5])), (8, 5));
}

#[test]
fn broken_packets_end_the_session() {
    for broken in [&[0, 0, 0, 0][..], &[0xff; 8], &[0, 0, 0, 9, 1], &[0, 0, 0, 1, 3]] {
        serve(broken, &mut Vec::new()).expect_err("no session");
    }
    serve(&[][..], &mut Vec::new()).expect("an end");
    let init = [0, 0, 0, 5, 1, 0, 0, 0, 3];
    let mut output = Vec::new();
    serve(&init[..], &mut output).expect("an end");
    assert_eq!(output[4..9], [2, 0, 0, 0, 3]);
}

/// Runs a batch of OpenSSH's `sftp` over the server in a directory; returns its output.
fn openssh(dir: &Path, batch: &str) -> String {
    let own = std::env::current_exe().expect("a path");
    let server = own.parent().and_then(Path::parent).expect("a parent").join("examples/server");
    std::fs::write(dir.join("batch"), batch).expect("written");
    let output = Command::new("sftp")
        .args(["-q", "-b", "batch", "-D"])
        .arg(server)
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .expect("openssh-client is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}\n{text}");
    text
}

#[test]
fn openssh_puts_gets_lists_and_removes() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| -> PathBuf { dir.path().join(name) };
    let content: Vec<u8> = (0..3_000_001u32).map(|n| (n % 251) as u8 ^ (n >> 12) as u8).collect();
    fs::write(at("here"), &content).expect("written");
    fs::set_permissions(at("here"), fs::Permissions::from_mode(0o640)).expect("set");
    let said = openssh(
        dir.path(),
        "mkdir sub\nput -p here sub/there\nget sub/there back\nchmod 600 sub/there\n\
         ln -s there sub/link\nrename sub/there sub/moved\nls -l sub\npwd\ndf sub\n",
    );
    assert!(
        said.contains("moved") && said.contains("link") && said.contains("-rw-------"),
        "{said}"
    );
    assert_eq!(fs::read(at("sub/moved")).expect("put"), content);
    assert_eq!(fs::read(at("back")).expect("got"), content);
    // A part of a download is continued.
    fs::write(at("back"), &content[..1_000_000]).expect("cut");
    openssh(dir.path(), "reget sub/moved back\nrm sub/link\nrm sub/moved\nrmdir sub\n");
    assert_eq!(fs::read(at("back")).expect("got"), content);
    assert!(!at("sub").exists());
}

#[test]
fn directory_of_many_names_is_listed_in_parts() {
    let dir = tempfile::tempdir().expect("a directory");
    for n in 0..2000 {
        fs::write(dir.path().join(format!("name-{n:04}")), "").expect("written");
    }
    let said = openssh(dir.path(), "ls -1\n");
    assert_eq!(said.lines().filter(|line| line.contains("name-")).count(), 2000);
}
