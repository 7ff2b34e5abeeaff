//! Signed apt repositories, made by packaging/build-repo.sh.

use std::{fs, os::unix::fs::DirBuilderExt as _, path::Path};

use super::root::{limited, said, target};

/// Makes a key that signs, in gpg's folder `keys`, which is made if it is missing; returns its address.
#[track_caller]
pub(crate) fn signing_key(keys: &Path, name: &str) -> String {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(keys).expect("made");
    let address = format!("{name}@example.org");
    let words = ["gpg", "--batch", "--passphrase", "", "--quick-gen-key", &address];
    let mut command = limited(&words);
    command.args(["default", "default", "never"]).env("GNUPGHOME", keys);
    let (code, text) = said(&command.output().expect("started"));
    assert_eq!(code, Some(0), "{text}");
    address
}

/// Adds the packages in `debs` to the repository `repo`, signed with a key of the folder `keys`; returns exit code and
/// output. The script runs under an umask that hides files from others, which must not show in the repository.
pub(crate) fn build(repo: &Path, debs: &Path, keys: &Path, key: &str) -> (Option<i32>, String) {
    let mut command = limited(&["sh", "-c", "umask 077; exec packaging/build-repo.sh"]);
    command.current_dir(target().parent().expect("the checkout"));
    command.env("DEBS", debs).env("REPO", repo).env("KEY", key).env("GNUPGHOME", keys);
    said(&command.env("LC_ALL", "C").output().expect("started"))
}
