//! Context of `sandboxctl` that `setup` saves: its configuration, and the token in a file beside it.

use std::{
    fs::DirBuilder,
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use daemon::{
    replace::{Access, replace},
    text,
};
use proto::name::Team;
use toml_edit::{DocumentMut, Item, Table, value};

/// Connection to save.
#[derive(Debug)]
pub(super) struct Saved<'a> {
    /// Address of the controller.
    pub(super) endpoint: &'a str,
    /// CA of its certificate.
    pub(super) ca: &'a Path,
    /// Team of the token.
    pub(super) team: &'a Team,
    /// Token, which goes into a file of its own.
    pub(super) token: &'a str,
}

/// Returns the path of the configuration that `sandboxctl` reads.
pub(super) fn usual() -> Option<PathBuf> {
    std::env::home_dir().map(|home| home.join(".config/sandboxctl/config.toml"))
}

/// Saves a context, and chooses it unless another is chosen.
///
/// # Errors
/// When a file cannot be read or written.
pub(super) fn save(config: &Path, name: &str, saved: &Saved<'_>) -> io::Result<()> {
    let token_file = config.with_file_name("tokens").join(name);
    for dir in [config.parent(), token_file.parent()].into_iter().flatten() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let mut document: DocumentMut =
        text::read_if_there(config)?.unwrap_or_default().parse().map_err(io::Error::other)?;
    let contexts = document.entry("contexts").or_insert_with(|| {
        let mut contexts = Table::new();
        contexts.set_implicit(true);
        Item::Table(contexts)
    });
    let not_a_table = || io::Error::other("`contexts` is not a table");
    let contexts = contexts.as_table_like_mut().ok_or_else(not_a_table)?;
    let mut table = Table::new();
    let path = |path: &Path| value(path.to_string_lossy().as_ref());
    table.insert("endpoint", value(saved.endpoint));
    table.insert("token_file", path(&token_file));
    table.insert("ca", path(saved.ca));
    table.insert("team", value(saved.team.as_str()));
    contexts.insert(name, Item::Table(table));
    if document.get("context").is_none() {
        document.insert("context", value(name));
    }
    replace(&token_file, format!("{}\n", saved.token).as_bytes(), Access::PRIVATE)?;
    replace(config, document.to_string().as_bytes(), Access::PRIVATE)
}
