//! Files that `make deb` has built, found by the name of their package.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::root::target;

/// Returns the folder of the packages.
pub(crate) fn dir() -> PathBuf {
    target().join("debian")
}

/// Returns the only file of a folder whose name begins with that of a package.
#[track_caller]
pub(crate) fn file(dir: &Path, package: &str, end: &str) -> PathBuf {
    let name = |path: &PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let fits = |name: String| name.starts_with(&format!("{package}_")) && name.ends_with(end);
    let all = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let found: Vec<_> = all.filter(|path| name(path).is_some_and(fits)).collect();
    let [one] = found.as_slice() else {
        panic!(
            "{} must have one file of {package} with {end} (make deb): {found:?}",
            dir.display()
        );
    };
    one.clone()
}
