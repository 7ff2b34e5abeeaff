//! Commands on the controller's machine, such as `token create` and `node-cert`. They ask no running
//! controller, so they leave their entries in a file, `local.jsonl`; the controller, which alone adds to the
//! chain, takes them into the log within a second, or when it starts.
//!
//! A command syncs a `begun` entry before it does anything, and its end after that: what was done has an entry
//! whatever crashes. The file is emptied once what it holds is synced in the log. A controller that ends in
//! between takes entries a second time; all entries of one command have its `request_id`.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{
        DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _, fchown,
    },
    path::{Path, PathBuf},
    sync::{Weak, atomic::Ordering},
    time::Duration,
};

use anyhow::Context as _;
use daemon::audit::{Kind, LINE_MAX, Record, bounded, code_name};
use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
    unistd::{Uid, User},
};
use tokio::{
    sync::oneshot,
    task::spawn_blocking,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use super::{FLUSH, Inner, Message, log};
use crate::clock::{Clock, SystemClock};

/// Name of the file, in the directory of the log.
const FILE: &str = "local.jsonl";
/// Size of the file from which commands are refused: no controller has run for thousands of them.
const BYTES_MAX: u64 = 1 << 20;
/// Time between two looks of the controller.
const LOOK: Duration = Duration::from_secs(1);
/// Peer of the entries.
const PEER: &str = "local";
/// File with the kernel's login uid of this process: that of the login which it stems from. `sudo` and `su` keep it.
const LOGIN_UID: &str = "/proc/self/loginuid";
/// Login uid of a process that stems from no login, such as a service.
const NO_LOGIN: u32 = u32::MAX;

/// Failure to record a command.
#[derive(Debug, thiserror::Error)]
#[error("the command cannot be recorded for the audit log in {0}")]
pub struct LocalError(PathBuf, #[source] io::Error);

/// Command on the controller's machine, as its entries name it. Never arguments or secrets.
#[derive(Debug, Clone, Copy)]
pub struct LocalCommand<'a> {
    /// Name in the place of a method, such as `LocalTokenCreate`.
    pub method: &'a str,
    /// Object with its kind, such as `node:pve1`; empty: none.
    pub object: &'a str,
    /// Team that the object is of; empty: none.
    pub owner: &'a str,
}

/// Does the work of a command that the audit log is told of: of its begin before the work, and of its end.
///
/// # Errors
/// When the begin cannot be recorded, and then nothing is done; when the work fails; when its end cannot be
/// recorded.
pub async fn recorded<T>(
    data_dir: &Path,
    command: LocalCommand<'_>,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    // A controller that was never set up has no log. The work says what is missing.
    if !data_dir.is_dir() {
        return work.await;
    }
    let entry = LocalEntry::begin(&super::dir(data_dir), &SystemClock, command).await?;
    let done = work.await;
    let ended = entry.end(&SystemClock, done.is_ok()).await;
    let done = done?;
    ended.context("the command is carried out, but its end is not recorded")?;
    Ok(done)
}

/// Command that is under way, and whose begin is recorded. Dropping it leaves it without an end.
#[derive(Debug)]
pub struct LocalEntry {
    dir: PathBuf,
    record: Record,
    started: Instant,
}

impl LocalEntry {
    /// Records the begin of a command, durably. `dir` is the directory of the log.
    ///
    /// # Errors
    /// When that is impossible: then the command is not to be carried out.
    pub async fn begin(
        dir: &Path,
        clock: &dyn Clock,
        command: LocalCommand<'_>,
    ) -> Result<Self, LocalError> {
        let mut number = [0; 8];
        getrandom::fill(&mut number).expect("the kernel gives random bytes");
        let record = Record {
            method: bounded(command.method),
            user: bounded(&operator(Uid::current(), login_uid(Path::new(LOGIN_UID)))),
            peer: PEER.to_owned(),
            object: bounded(command.object),
            owner: bounded(command.owner),
            request_id: format!("local-{:016x}", u64::from_be_bytes(number)),
            ..Record::new(Kind::Begun, clock.now_ms())
        };
        append(dir, &record).await?;
        Ok(Self { dir: dir.to_owned(), record, started: Instant::now() })
    }

    /// Records the end of the command, durably.
    ///
    /// # Errors
    /// When that is impossible.
    pub async fn end(self, clock: &dyn Clock, is_done: bool) -> Result<(), LocalError> {
        let record = Record {
            at_ms: clock.now_ms(),
            kind: Kind::Call,
            code: code_name(if is_done { 0 } else { 2 }).to_owned(),
            duration_ms: Some(daemon::clock::millis(self.started.elapsed())),
            ..self.record
        };
        append(&self.dir, &record).await
    }
}

/// Names the user of a process, and who had logged in, where that is known.
fn operator(own: Uid, login: Option<Uid>) -> String {
    let own = user(own);
    match login {
        Some(login) => format!("{own}, login {}", user(login)),
        None => own,
    }
}

/// Name of a user with the number; the number alone where no user has it.
fn user(uid: Uid) -> String {
    match User::from_uid(uid) {
        Ok(Some(user)) => format!("{} (uid {uid})", user.name),
        Ok(None) | Err(_) => format!("uid {uid}"),
    }
}

/// Reads a login uid; `None` where there is none, or the kernel keeps none.
fn login_uid(path: &Path) -> Option<Uid> {
    let uid = daemon::text::read(path).ok()?.trim().parse().ok()?;
    (uid != NO_LOGIN).then(|| Uid::from_raw(uid))
}

async fn append(dir: &Path, record: &Record) -> Result<(), LocalError> {
    let appended = async {
        let (file, owner) = open(dir)?;
        log::lock(&file).await?;
        write(&file, owner, record)
    };
    appended.await.map_err(|error| LocalError(dir.to_owned(), error))
}

/// Opens the file, and makes it where it is missing. Returns with it the user who is to own it: the one of the
/// controller's state, for root may run the command.
fn open(dir: &Path) -> io::Result<(File, (u32, u32))> {
    let state = fs::metadata(dir.parent().unwrap_or(dir))?;
    let owner = (state.uid(), state.gid());
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        Ok(()) | Err(_) => {}
    }
    // Root follows no link of another user, who may replace the directory at any moment: from here on it is this
    // handle.
    let only = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    let folder = File::options().read(true).custom_flags(only.bits()).open(dir)?;
    give(&folder, owner)?;
    let flags = OFlag::O_RDWR
        | OFlag::O_APPEND
        | OFlag::O_CREAT
        | OFlag::O_NOFOLLOW
        | OFlag::O_NONBLOCK
        | OFlag::O_CLOEXEC;
    let file = openat(&folder, FILE, flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
    folder.sync_all()?;
    Ok((file.into(), owner))
}

fn give(file: &File, owner: (u32, u32)) -> io::Result<()> {
    let is_of_owner = file.metadata()?.uid() == owner.0;
    if is_of_owner { Ok(()) } else { fchown(file, Some(owner.0), Some(owner.1)) }
}

/// Appends a line to the file, which is locked.
fn write(mut file: &File, owner: (u32, u32), record: &Record) -> io::Result<()> {
    let about = file.metadata()?;
    if !about.is_file() || about.nlink() != 1 {
        return Err(io::Error::other("local.jsonl is no file of its own"));
    }
    // What has begun also ends.
    if record.kind == Kind::Begun && about.len() >= BYTES_MAX {
        let why = "local.jsonl is full: start the controller, which takes it into the log";
        return Err(io::Error::other(why));
    }
    give(file, owner)?;
    let mut line = Vec::new();
    let mut last = [b'\n'];
    if about.len() > 0 {
        file.read_exact_at(&mut last, about.len() - 1)?;
    }
    // A command that crashed has left half of a line.
    if last != [b'\n'] {
        line.push(b'\n');
    }
    serde_json::to_writer(&mut line, record)?;
    line.push(b'\n');
    file.write_all(&line)?;
    file.sync_all()
}

/// Entries of commands that were found.
struct Found {
    records: Vec<Record>,
    /// Lines that are no entries.
    broken: u64,
    /// Bytes of the file up to the end of what was found.
    end: u64,
}

/// Takes the entries of commands into the log, until it is closed or all of its handles are gone.
pub(super) async fn take_all(dir: PathBuf, audit: Weak<Inner>) {
    let path = dir.join(FILE);
    // Bytes of the file that the writer of the log has.
    let mut taken = 0;
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failed_before = false;
    loop {
        looks.tick().await;
        if audit.strong_count() == 0 {
            return;
        }
        let from = path.clone();
        let Ok(read) = spawn_blocking(move || read(&from, taken)).await else { return };
        let found = match read {
            Ok(found) => found,
            Err(error) => {
                if !failed_before {
                    tracing::error!(%error, "audit log: entries of commands cannot be read yet");
                }
                failed_before = true;
                continue;
            }
        };
        failed_before = false;
        let Some(found) = found else { continue };
        let Some(inner) = audit.upgrade() else { return };
        taken = found.end;
        if !queue_all(&inner, found).await {
            return;
        }
        if is_synced(&inner).await {
            let from = path.clone();
            let Ok(emptied) = spawn_blocking(move || empty(&from, taken)).await else { return };
            match emptied {
                Ok(true) => taken = 0,
                // A command has written meanwhile: the next look takes that.
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(%error, "audit log: entries of commands stay in their file");
                }
            }
        }
    }
}

/// Reads what is behind `taken`; `None` where there is nothing, or a command writes just now.
fn read(path: &Path, taken: u64) -> io::Result<Option<Found>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let bytes = file.metadata()?.len();
    if bytes == 0 || file.try_lock().is_err() {
        return Ok(None);
    }
    // One that somebody has cut is read from its start.
    let start = if taken > bytes { 0 } else { taken };
    file.seek(SeekFrom::Start(start))?;
    let mut text = Vec::new();
    // The ends of what has begun may stand behind the bound.
    file.take(2 * BYTES_MAX).read_to_end(&mut text)?;
    let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let (mut records, mut broken) = (Vec::new(), 0);
    for line in lines {
        match parse(line) {
            Some(record) => records.push(record),
            None => broken += 1,
        }
    }
    Ok(Some(Found { records, broken, end: start + text.len() as u64 }))
}

fn parse(line: &[u8]) -> Option<Record> {
    let record =
        (line.len() <= LINE_MAX).then(|| serde_json::from_slice::<Record>(line).ok())??;
    matches!(record.kind, Kind::Begun | Kind::Call).then_some(record)
}

/// Gives entries to the writer of the log; false when that has ended.
async fn queue_all(inner: &Inner, found: Found) -> bool {
    if found.broken > 0 {
        tracing::warn!(lines = found.broken, "audit log: lines of commands are no entries");
        inner.shared.dropped.fetch_add(found.broken, Ordering::Relaxed);
        inner.shared.lost.fetch_add(found.broken, Ordering::Relaxed);
    }
    for record in found.records {
        if inner.queue.send(Message::Always(Box::new(record))).await.is_err() {
            return false;
        }
    }
    true
}

/// Returns true once what the writer was given before is on the disk.
async fn is_synced(inner: &Inner) -> bool {
    let (done, written) = oneshot::channel();
    let asked =
        async { inner.queue.send(Message::Flush(done)).await.is_ok() && written.await.is_ok() };
    let answered = timeout(FLUSH, asked).await.unwrap_or(false);
    // The writer answers a failure, too.
    answered && inner.shared.visible.lock().failing.is_none()
}

/// Empties the file if it has `taken` bytes; false if it has others, or a command writes just now.
fn empty(path: &Path, taken: u64) -> io::Result<bool> {
    let file = File::options().write(true).open(path)?;
    if file.try_lock().is_err() || file.metadata()?.len() != taken {
        return Ok(false);
    }
    file.set_len(0)?;
    file.sync_all()?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn login_uid_is_read_where_there_is_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("loginuid");
        assert_eq!(login_uid(&path), None, "a kernel without it");
        for (text, uid) in
            [("0", Some(0)), ("1000\n", Some(1000)), ("4294967295", None), ("", None), ("x", None)]
        {
            fs::write(&path, text).expect("written");
            assert_eq!(login_uid(&path), uid.map(Uid::from_raw), "{text:?}");
        }
    }

    #[test]
    fn who_is_behind_sudo_is_named() {
        let (root, nobody) = (Uid::from_raw(0), Uid::from_raw(4_000_000_000));
        assert_eq!(operator(root, None), "root (uid 0)");
        assert_eq!(operator(root, Some(root)), "root (uid 0), login root (uid 0)");
        assert_eq!(operator(root, Some(nobody)), "root (uid 0), login uid 4000000000");
        assert_eq!(operator(nobody, Some(root)), "uid 4000000000, login root (uid 0)");
        // The longest names that Linux takes.
        let name = "n".repeat(32);
        let longest = format!("{name} (uid 4294967294), login {name} (uid 4294967294)");
        assert_eq!(bounded(&longest), longest);
    }
}
