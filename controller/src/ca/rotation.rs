//! Puts a new CA in the place of the old one, so that a crash at any moment leaves a whole one.
//!
//! ```text
//!  step     ca     ca.new   ca.old-N   after a crash
//!  begin    old    -        -
//!  build    old    partial  -          the old one stays; what is built is removed
//!  away     -      whole    old        `ca.new` is put in its place
//!  place    new    -        old        done
//! ```
//! Whoever changes these directories holds the lock of the data directory.

use std::{
    fs::{self, DirBuilder, File, TryLockError},
    io::{self, ErrorKind},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use super::{CLIENT_CA, CLIENT_CA_FILES, Error, Files, Result, find, make, write};

/// Most old CAs that are kept beside the new one.
const OLD_MAX: u32 = 100;

/// Rotation of the CA that has not begun.
#[derive(Debug)]
pub struct Rotation<'a> {
    data: &'a Path,
    names: &'a [String],
    old: PathBuf,
    own: fn(&Path) -> io::Result<()>,
    _lock: File,
}

/// One step of a rotation. Each may be the last one before a crash.
type Step = for<'a> fn(&Rotation<'a>) -> Result<()>;

const STEPS: [Step; 6] = [
    |rotation| rotation.clear(),
    |rotation| rotation.keep_client_ca(),
    |rotation| rotation.build(),
    |rotation| rotation.give(),
    |rotation| rotation.away(),
    |rotation| rotation.place(),
];

impl<'a> Rotation<'a> {
    /// Prepares a rotation, after an interrupted one was finished or undone. `names`: those of the controller's
    /// certificate. `own` gives what is below a directory to the user of the controller.
    ///
    /// # Errors
    /// When another rotation is under way, or there are too many old CAs.
    pub fn new(
        data: &'a Path,
        names: &'a [String],
        own: fn(&Path) -> io::Result<()>,
    ) -> Result<Self> {
        let lock = lock(data)?.ok_or_else(|| {
            let source = io::Error::new(ErrorKind::ResourceBusy, "another rotation is under way");
            Error::File { path: data.to_owned(), source }
        })?;
        settle(data)?;
        Ok(Self { data, names, old: old_name(data)?, own, _lock: lock })
    }

    /// Returns the path that the old CA gets.
    pub fn old(&self) -> &Path {
        &self.old
    }

    /// Carries the rotation out.
    ///
    /// # Errors
    /// When a step fails; then the old CA is in its place.
    pub fn run(&self) -> Result<()> {
        STEPS.iter().try_for_each(|step| step(self)).inspect_err(|_| {
            if !self.current().exists() {
                drop(rename(&self.old, &self.current()));
            }
            drop(fs::remove_dir_all(self.draft()));
        })
    }

    fn current(&self) -> PathBuf {
        current(self.data)
    }

    fn draft(&self) -> PathBuf {
        draft(self.data)
    }

    fn clear(&self) -> Result<()> {
        let draft = self.draft();
        remove(&draft)?;
        DirBuilder::new().mode(0o700).create(&draft).map_err(in_file(&draft))
    }

    /// Copies the CA of client certificates, which signs nothing else: tokens that callers have stay good. One
    /// whose time is over, or that is broken, is not kept.
    fn keep_client_ca(&self) -> Result<()> {
        if !keeps_client_ca(self.data)? {
            return Ok(());
        }
        for name in CLIENT_CA_FILES {
            let from = self.current().join(name);
            let text = daemon::text::read(&from).map_err(in_file(&from))?;
            let mode = if name.ends_with(".key") { 0o600 } else { 0o644 };
            write(&self.draft().join(name), &text, mode)?;
        }
        Ok(())
    }

    fn build(&self) -> Result<()> {
        make(&Files(self.draft()), self.names)?;
        sync(&self.draft())
    }

    fn give(&self) -> Result<()> {
        (self.own)(self.data).map_err(in_file(self.data))?;
        sync(self.data)
    }

    fn away(&self) -> Result<()> {
        rename(&self.current(), &self.old)
    }

    fn place(&self) -> Result<()> {
        rename(&self.draft(), &self.current())
    }
}

/// Returns whether a rotation keeps the CA of client certificates, so that these stay good.
///
/// # Errors
/// When a file cannot be read.
pub fn keeps_client_ca(data: &Path) -> Result<bool> {
    match find(&Files::new(data), CLIENT_CA) {
        Ok(Some(authority)) => Ok(!authority.has_ended()),
        Err(error @ Error::File { .. }) => Err(error),
        // An earlier version had none.
        Ok(None) | Err(_) => Ok(false),
    }
}

/// Finishes or undoes a rotation that a crash has interrupted; leaves one alone that is under way.
///
/// # Errors
/// When a directory cannot be renamed or removed.
pub(super) fn recover(data: &Path) -> Result<()> {
    if !draft(data).exists() {
        return Ok(());
    }
    match lock(data)? {
        Some(_lock) => settle(data),
        None => Ok(()),
    }
}

/// Leaves one CA, by the table above. Under the lock.
fn settle(data: &Path) -> Result<()> {
    let (current, draft) = (current(data), draft(data));
    if !draft.exists() {
        return Ok(());
    }
    if current.exists() {
        tracing::warn!(path = %draft.display(), "removing a new CA that was not finished");
        remove(&draft)
    } else {
        tracing::warn!(path = %current.display(), "finishing an interrupted rotation of the CA");
        rename(&draft, &current)
    }
}

/// Locks the directories of CAs; `None` while another process has the lock.
fn lock(data: &Path) -> Result<Option<File>> {
    let dir = File::open(data).map_err(in_file(data))?;
    match dir.try_lock() {
        Ok(()) => Ok(Some(dir)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(source)) => Err(Error::File { path: data.to_owned(), source }),
    }
}

fn current(data: &Path) -> PathBuf {
    data.join("ca")
}

fn draft(data: &Path) -> PathBuf {
    data.join("ca.new")
}

/// Returns a name for the old CA that nothing has.
///
/// # Errors
/// When there are too many old CAs.
pub fn old_name(data: &Path) -> Result<PathBuf> {
    let mut names = (1..=OLD_MAX).map(|number| data.join(format!("ca.old-{number}")));
    names.find(|path| fs::symlink_metadata(path).is_err()).ok_or_else(|| {
        let why = format!("there are {OLD_MAX} old CAs: remove some");
        Error::File { path: data.to_owned(), source: io::Error::other(why) }
    })
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        done => done.map_err(in_file(dir)),
    }
}

/// Renames a directory, durably.
fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(in_file(from))?;
    sync(to.parent().unwrap_or(Path::new("/")))
}

fn sync(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(in_file(dir))
}

fn in_file(path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::File { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::{ClientSigner, Lives, Own, Signer, init, names};

    fn certificate(data: &Path) -> String {
        fs::read_to_string(data.join("ca/ca.crt")).expect("a CA")
    }

    fn nobody(_: &Path) -> io::Result<()> {
        Ok(())
    }

    /// Checks that there is one whole CA, and no draft.
    fn is_whole(data: &Path, of: &[String]) {
        Signer::load(data, Lives::default()).expect("the CA");
        ClientSigner::load(data).expect("the CA of callers");
        let own = Own { files: Files::new(data), life: Lives::default().agent };
        daemon::tls::client(&own.identity().expect("read")).expect("certificate and key fit");
        assert_eq!(names(data).expect("names"), of);
        assert!(!draft(data).exists());
    }

    #[test]
    fn new_ca_keeps_the_names_and_the_old_one_is_beside_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let data = dir.path();
        init(data, &["api.example.com".to_owned(), "192.0.2.11".to_owned()]).expect("made");
        let (first, of) = (certificate(data), names(data).expect("names"));
        for round in 1..=2 {
            let before = certificate(data);
            let rotation = Rotation::new(data, &of, nobody).expect("prepared");
            rotation.run().expect("replaced");
            let old = rotation.old().to_owned();
            assert!(old.ends_with(format!("ca.old-{round}")), "{old:?}");
            assert_eq!(fs::read_to_string(old.join("ca.crt")).expect("kept"), before);
            assert_ne!(certificate(data), before);
            for file in CLIENT_CA_FILES {
                let read = |dir: &Path| fs::read(dir.join(file)).expect("the CA of callers");
                assert_eq!(read(&data.join("ca")), read(&old), "{file}");
            }
            is_whole(data, &of);
        }
        assert_ne!(certificate(data), first);
    }

    #[test]
    fn broken_ca_of_callers_is_replaced_by_a_new_one() {
        for file in CLIENT_CA_FILES {
            let dir = tempfile::tempdir().expect("a directory");
            let data = dir.path();
            init(data, &[]).expect("made");
            let of = names(data).expect("names");
            assert!(keeps_client_ca(data).expect("read"));
            fs::remove_file(data.join("ca").join(file)).expect("removed");
            assert!(!keeps_client_ca(data).expect("read"));
            Rotation::new(data, &of, nobody).expect("prepared").run().expect("replaced");
            is_whole(data, &of);
        }
    }

    #[test]
    fn crash_after_any_step_leaves_one_whole_ca() {
        for done in 0..=STEPS.len() {
            let dir = tempfile::tempdir().expect("a directory");
            let data = dir.path();
            init(data, &["api.example.com".to_owned()]).expect("made");
            let (first, of) = (certificate(data), names(data).expect("names"));
            let rotation = Rotation::new(data, &of, nobody).expect("prepared");
            STEPS[..done].iter().try_for_each(|step| step(&rotation)).expect("done");
            recover(data).expect("left alone while the rotation runs");
            assert_eq!(draft(data).exists(), (1..STEPS.len()).contains(&done), "{done}");
            drop(rotation);
            recover(data).expect("recovered");
            recover(data).expect("again");
            is_whole(data, &of);
            let old = data.join("ca.old-1/ca.crt");
            if done >= STEPS.len() - 1 {
                assert_ne!(certificate(data), first, "{done}: it is finished");
                assert_eq!(fs::read_to_string(old).expect("kept"), first, "{done}");
            } else {
                assert_eq!(certificate(data), first, "{done}: it is undone");
                assert!(!old.exists(), "{done}");
            }
            // The command can be repeated, and `init` makes no third CA.
            let before = certificate(data);
            init(data, &[]).expect("nothing to do");
            assert_eq!(certificate(data), before, "{done}");
            Rotation::new(data, &of, nobody).expect("prepared").run().expect("replaced");
            is_whole(data, &of);
        }
    }

    #[test]
    fn step_that_fails_leaves_the_old_ca() {
        fn fails(_: &Path) -> io::Result<()> {
            Err(ErrorKind::PermissionDenied.into())
        }
        let dir = tempfile::tempdir().expect("a directory");
        let data = dir.path();
        init(data, &[]).expect("made");
        let (first, of) = (certificate(data), names(data).expect("names"));
        let wrong = ["no name".to_owned()];
        let own: fn(&Path) -> io::Result<()> = nobody;
        for (names, own) in [(&wrong[..], own), (&of, fails)] {
            let rotation = Rotation::new(data, names, own).expect("prepared");
            rotation.run().expect_err("failed");
            assert!(!rotation.old().exists());
            drop(rotation);
            assert_eq!(certificate(data), first);
            is_whole(data, &of);
        }
    }

    #[test]
    fn of_two_rotations_at_once_one_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        init(dir.path(), &[]).expect("made");
        let first = Rotation::new(dir.path(), &[], nobody).expect("prepared");
        let error = Rotation::new(dir.path(), &[], nobody).expect_err("refused");
        assert!(matches!(error, Error::File { .. }), "{error}");
        drop(first);
        Rotation::new(dir.path(), &[], nobody).expect("prepared");
    }
}
