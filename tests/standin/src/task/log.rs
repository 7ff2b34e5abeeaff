//! Task logs: a file per task, an index of ended tasks, a list of running tasks.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::upid::{Upid, now};
use crate::failure::ignore;

/// Status of a task that ended unexpectedly, in the words of the index.
pub(crate) const UNEXPECTED: &str = "unexpected status";

/// Returns the log file of a task, in a directory named by the last hex digit of its time.
pub(crate) fn path(log_dir: &Path, upid: &Upid) -> PathBuf {
    log_dir.join(format!("{:X}", upid.time % 16)).join(upid.to_string())
}

/// Opens the log of a new task and adds the task to the running ones. Tasks whose parent died are
/// then added to the index.
pub(crate) fn begin(log_dir: &Path, upid: &Upid) -> io::Result<File> {
    let file = path(log_dir, upid);
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir)?;
    }
    let log = OpenOptions::new().create(true).append(true).open(file)?;
    let _lock = lock(log_dir)?;
    let mut running = sweep(log_dir)?;
    running.push(upid.clone());
    write_active(log_dir, &running)?;
    Ok(log)
}

/// Writes the last line of a log and the line in the index.
pub(crate) fn end(log_dir: &Path, log: &mut File, upid: &Upid, status: &str) -> io::Result<()> {
    let last = if status == "OK" { "TASK OK".to_owned() } else { format!("TASK ERROR: {status}") };
    if status != UNEXPECTED {
        writeln!(log, "{last}")?;
    }
    let _lock = lock(log_dir)?;
    index(log_dir, upid, status)?;
    let mut running = sweep(log_dir)?;
    running.retain(|other| other != upid);
    write_active(log_dir, &running)
}

fn lock(log_dir: &Path) -> io::Result<File> {
    let file = File::create(log_dir.join(".active.lock"))?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

fn index(log_dir: &Path, upid: &Upid, status: &str) -> io::Result<()> {
    let mut index = OpenOptions::new().create(true).append(true).open(log_dir.join("index"))?;
    let status = status.trim_end().replace('\n', " ");
    writeln!(index, "{upid} {:08X} {status}", now())
}

/// Returns the running tasks, and adds tasks to the index whose worker and parent are gone.
fn sweep(log_dir: &Path) -> io::Result<Vec<Upid>> {
    let text = fs::read_to_string(log_dir.join("active")).unwrap_or_default();
    let noted = text.lines().filter_map(|line| Upid::parse(line.split(' ').next()?));
    let (running, gone): (Vec<Upid>, Vec<Upid>) = noted.partition(Upid::is_alive);
    for upid in gone {
        // The parent has added tasks that ended normally.
        let done = fs::read_to_string(log_dir.join("index")).unwrap_or_default();
        if !done.lines().any(|line| line.starts_with(&upid.to_string())) {
            index(log_dir, &upid, UNEXPECTED)?;
        }
    }
    Ok(running)
}

fn write_active(log_dir: &Path, running: &[Upid]) -> io::Result<()> {
    let text: String = running.iter().map(|upid| format!("{upid} 0\n")).collect();
    let path = log_dir.join("active");
    let tmp = path.with_extension(format!("tmp.{}", std::process::id()));
    fs::write(&tmp, text)?;
    let renamed = fs::rename(&tmp, path);
    if renamed.is_err() {
        ignore(fs::remove_file(tmp));
    }
    renamed
}
