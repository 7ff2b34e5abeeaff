//! What `sandboxctl` remembers between two calls: the current sandbox, and the last created one, for
//! each controller. A file for each, replaced as a whole, so that two calls at once cannot mix them.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::PathBuf,
};

use crate::failure::Failure;

/// Longest id that is read from a file.
const ID_MAX: u64 = 256;

/// Remembered sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// Chosen by `use`, written `@current`.
    Current,
    /// Created last, written `@last`.
    Last,
}

impl Slot {
    /// Name of its file; with `@` before it, the way to write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Last => "last",
        }
    }
}

/// Memory about the sandboxes of one controller.
#[derive(Debug, Clone)]
pub struct State {
    /// Directory of the files; none where there is no home.
    dir: Option<PathBuf>,
}

impl State {
    /// Finds the memory about the controller at this address, under XDG's directory for states.
    pub fn of(address: &str) -> Self {
        let set = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
        let usual = || std::env::home_dir().map(|home| home.join(".local/state"));
        let top = set.filter(|path| path.is_absolute()).or_else(usual);
        Self { dir: top.map(|top| top.join("sandboxctl").join(file_name(address))) }
    }

    /// Id of a remembered sandbox.
    ///
    /// # Errors
    /// When its file cannot be read.
    pub fn get(&self, slot: Slot) -> Result<Option<String>, Failure> {
        let Some(path) = self.dir.as_ref().map(|dir| dir.join(slot.name())) else {
            return Ok(None);
        };
        let mut text = String::new();
        let read = File::open(&path).and_then(|file| file.take(ID_MAX).read_to_string(&mut text));
        match read {
            Ok(_) => Ok(Some(text.trim().to_owned()).filter(|id| !id.is_empty())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Failure::local(format!("cannot read {}: {error}", path.display()))),
        }
    }

    /// Remembers a sandbox.
    ///
    /// # Errors
    /// When its file cannot be written.
    pub fn set(&self, slot: Slot, id: &str) -> Result<(), Failure> {
        let Some(dir) = &self.dir else { return Ok(()) };
        let path = dir.join(slot.name());
        let new = dir.join(format!(".{}.{}", slot.name(), std::process::id()));
        let written = fs::create_dir_all(dir)
            .and_then(|()| fs::write(&new, format!("{id}\n")))
            .and_then(|()| fs::rename(&new, &path));
        written.map_err(|error| {
            fs::remove_file(&new).ok();
            Failure::local(format!("cannot write {}: {error}", path.display()))
        })
    }

    /// Forgets a sandbox.
    ///
    /// # Errors
    /// When its file cannot be removed.
    pub fn clear(&self, slot: Slot) -> Result<(), Failure> {
        let Some(path) = self.dir.as_ref().map(|dir| dir.join(slot.name())) else { return Ok(()) };
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Failure::local(format!("cannot remove {}: {error}", path.display())))
            }
            _ => Ok(()),
        }
    }
}

/// Name of a directory for an address.
fn file_name(address: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
    address.chars().map(|c| if plain(c) { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembered_sandbox_is_read_back_and_forgotten() {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = State { dir: Some(dir.path().join("a/b")) };
        assert_eq!(state.get(Slot::Current).expect("readable"), None);
        state.set(Slot::Current, "one").expect("written");
        state.set(Slot::Current, "two").expect("written");
        assert_eq!(state.get(Slot::Current).expect("readable").as_deref(), Some("two"));
        assert_eq!(state.get(Slot::Last).expect("readable"), None);
        state.clear(Slot::Current).expect("removed");
        state.clear(Slot::Current).expect("nothing to remove");
        assert_eq!(state.get(Slot::Current).expect("readable"), None);
        let left = fs::read_dir(dir.path().join("a/b")).expect("readable").count();
        assert_eq!(left, 0, "no half files");
    }

    #[test]
    fn addresses_name_directories() {
        assert_eq!(file_name("controller.example:7443"), "controller.example_7443");
        assert_eq!(file_name("[::1]:7443"), "___1__7443");
        assert!(!file_name("../x:1").contains('/'));
    }
}
