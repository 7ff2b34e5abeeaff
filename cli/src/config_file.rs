//! The configuration file: the connection at its top level, and contexts, which are connections with a
//! name. Changes keep comments and everything else as it is written.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File as FsFile},
    io::{self, Read},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use daemon::replace::{Access, replace};
use proto::secret::Secret;
use serde::Deserialize;
use toml_edit::{DocumentMut, Item, Table, TableLike};

use crate::failure::Failure;

/// Longest file that is read.
const BYTES_MAX: u64 = 1024 * 1024;

/// Content of the configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Address of the controller, where no context is chosen.
    pub endpoint: Option<String>,
    /// Bearer token.
    pub token: Option<Secret<String>>,
    /// File that holds the bearer token.
    pub token_file: Option<PathBuf>,
    /// CA of the controller's certificate.
    pub ca: Option<PathBuf>,
    /// Client certificate with its key.
    pub client_cert: Option<PathBuf>,
    /// Name of the chosen context.
    pub context: Option<String>,
    /// Contexts by their names.
    #[serde(default)]
    pub contexts: BTreeMap<String, Context>,
}

/// Connection with a name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// Address of the controller.
    pub endpoint: Option<String>,
    /// File that holds the bearer token.
    pub token_file: Option<PathBuf>,
    /// CA of the controller's certificate.
    pub ca: Option<PathBuf>,
    /// File of a client certificate and its key, in place of a token.
    pub client_cert: Option<PathBuf>,
    /// Team of the token, where it was seen at the login.
    pub team: Option<String>,
}

impl File {
    /// Context of this name.
    ///
    /// # Errors
    /// When there is none; the message lists those that there are.
    pub fn named(&self, name: &str) -> Result<&Context, Failure> {
        self.contexts.get(name).ok_or_else(|| {
            let names: Vec<_> = self.contexts.keys().map(String::as_str).collect();
            let there = match names.as_slice() {
                [] => "there are no contexts yet".to_owned(),
                [only] => format!("there is {only}"),
                names => format!("there are {}", names.join(", ")),
            };
            Failure::usage(
                format!("there is no context {name:?}; {there}"),
                "`sandboxctl context ls` shows them, and `sandboxctl login NAME` makes one",
            )
        })
    }
}

/// Path of the configuration file: the named one, or the usual one in the user's home.
pub fn path(named: Option<&Path>) -> Option<PathBuf> {
    let usual = || std::env::home_dir().map(|home| home.join(".config/sandboxctl/config.toml"));
    named.map(Path::to_owned).or_else(usual)
}

/// Reads the configuration. The usual file may be missing, a named one may not.
///
/// # Errors
/// When it cannot be read, or is not valid.
pub fn read(named: Option<&Path>) -> Result<File, Failure> {
    match path(named) {
        Some(path) if named.is_some() || path.exists() => load(&path),
        _ => Ok(File::default()),
    }
}

/// Reads the configuration before a change. The file may be missing, also a named one.
///
/// # Errors
/// When it cannot be read, or is not valid.
pub fn read_or_empty(named: Option<&Path>) -> Result<File, Failure> {
    match path(named) {
        Some(path) if path.exists() => load(&path),
        _ => Ok(File::default()),
    }
}

/// Saves a context, and chooses it. A token is saved beside it; returns its file.
///
/// # Errors
/// When a file cannot be written.
pub fn save(
    named: Option<&Path>,
    name: &str,
    new: Context,
    token: Option<&str>,
) -> Result<Option<PathBuf>, Failure> {
    let config = to_write(named)?;
    let token_file = token_file(&config, name);
    if let Some(token) = token {
        if let Some(dir) = token_file.parent() {
            make_dir(dir)?;
        }
        write(&token_file, format!("{token}\n").as_bytes())?;
    }
    let saved = token.map(|_| token_file.clone());
    let token_path = saved.clone();
    change(&config, |document| {
        let path = |path: PathBuf| path.to_string_lossy().into_owned();
        let keys = [
            ("endpoint", new.endpoint),
            ("token_file", token_path.map(path)),
            ("ca", new.ca.map(path)),
            ("client_cert", new.client_cert.map(path)),
            ("team", new.team),
        ];
        let contexts = document.entry("contexts").or_insert_with(|| {
            let mut contexts = Table::new();
            // Only the contexts in it have a heading.
            contexts.set_implicit(true);
            Item::Table(contexts)
        });
        if let Some(contexts) = contexts.as_table_like_mut() {
            let table = contexts.entry(name).or_insert_with(|| Item::Table(Table::new()));
            for (key, text) in keys {
                match (table.as_table_like_mut(), text) {
                    (Some(table), Some(text)) => set(table, key, &text),
                    (Some(table), None) => drop(table.remove(key)),
                    (None, _) => {}
                }
            }
        }
        set(document.as_table_mut(), "context", name);
    })?;
    if saved.is_none() {
        // Of an earlier login.
        remove_token(&token_file)?;
    }
    Ok(saved)
}

fn remove_token(token_file: &Path) -> Result<(), Failure> {
    match fs::remove_file(token_file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Failure::local(format!("cannot remove {}: {error}", token_file.display())))
        }
        _ => Ok(()),
    }
}

/// Chooses a context, which must be there.
///
/// # Errors
/// When the file cannot be written.
pub fn choose(named: Option<&Path>, name: &str) -> Result<(), Failure> {
    change(&to_write(named)?, |document| set(document.as_table_mut(), "context", name))
}

/// Sets a key, and keeps the comments around it.
fn set(table: &mut dyn TableLike, key: &str, text: &str) {
    let mut new = toml_edit::Value::from(text);
    // In place: a key that is inserted loses the lines above it.
    match table.get_mut(key) {
        Some(Item::Value(before)) => {
            *new.decor_mut() = before.decor().clone();
            *before = new;
        }
        Some(before) => *before = Item::Value(new),
        None => drop(table.insert(key, Item::Value(new))),
    }
}

/// Removes a context, and the token that its login saved. A chosen one is not chosen any more.
///
/// # Errors
/// When a file cannot be written or removed.
pub fn remove(named: Option<&Path>, name: &str) -> Result<(), Failure> {
    let config = to_write(named)?;
    change(&config, |document| {
        if let Some(contexts) = document.get_mut("contexts").and_then(Item::as_table_like_mut) {
            contexts.remove(name);
        }
        if document.get("context").and_then(Item::as_str) == Some(name) {
            document.remove("context");
        }
    })?;
    remove_token(&token_file(&config, name))
}

/// Whether a word can name a context: it is also the name of a file, whose draft has `.new` at its end.
pub fn is_name(word: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    (1..=64).contains(&word.len())
        && word.chars().all(plain)
        && word.starts_with(|c: char| c.is_ascii_alphanumeric())
        && !word.ends_with(".new")
}

/// File of the token that the login to a context saves.
fn token_file(config: &Path, name: &str) -> PathBuf {
    config.with_file_name("tokens").join(name)
}

/// Path to write: where the configuration is a link, what it leads to.
fn to_write(named: Option<&Path>) -> Result<PathBuf, Failure> {
    let path = path(named).ok_or_else(|| {
        Failure::usage(
            "there is no home directory for the configuration",
            "name a file with --config",
        )
    })?;
    let path = std::path::absolute(&path).unwrap_or(path);
    Ok(fs::canonicalize(&path).unwrap_or(path))
}

fn change(path: &Path, change: impl FnOnce(&mut DocumentMut)) -> Result<(), Failure> {
    let before = if path.exists() { text(path)? } else { String::new() };
    let mut document: DocumentMut = before.parse().map_err(|error: toml_edit::TomlError| {
        unusable(format!("{}: {}", path.display(), error.message()))
    })?;
    change(&mut document);
    if let Some(dir) = path.parent() {
        make_dir(dir)?;
    }
    write(path, document.to_string().as_bytes())
}

fn make_dir(dir: &Path) -> Result<(), Failure> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| Failure::local(format!("cannot make {}: {error}", dir.display())))
}

/// Replaces a file as a whole, for this user alone.
fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    replace(path, bytes, Access::PRIVATE)
        .map_err(|error| Failure::local(format!("cannot write {}: {error}", path.display())))
}

fn text(path: &Path) -> Result<String, Failure> {
    let mut text = String::new();
    FsFile::open(path)
        .and_then(|file| file.take(BYTES_MAX + 1).read_to_string(&mut text))
        .map_err(|error| Failure::local(format!("cannot read {}: {error}", path.display())))?;
    if text.len() as u64 > BYTES_MAX {
        return Err(unusable(format!("{} has more than 1 MiB", path.display())));
    }
    Ok(text)
}

fn load(path: &Path) -> Result<File, Failure> {
    daemon::config::load(path).map_err(|error| match error {
        // The whole error shows the line, which may hold a token.
        daemon::config::Error::Parse { path, source } => {
            let at = source.span().map_or(0, |span| span.start);
            let line = text(&path).unwrap_or_default();
            let line = line.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1;
            unusable(format!("{}: line {line}: {}", path.display(), source.message()))
        }
        error @ daemon::config::Error::Read { .. } => {
            unusable(daemon::chain::Chain(&error).to_string())
        }
    })
}

fn unusable(message: String) -> Failure {
    Failure::usage(message, "correct the file, or name another with --config")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("there").permissions().mode() & 0o777
    }

    fn context(endpoint: &str) -> Context {
        Context { endpoint: Some(endpoint.into()), ..Context::default() }
    }

    #[test]
    fn change_keeps_what_people_wrote() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("a/config.toml");
        fs::create_dir_all(dir.path().join("a")).expect("made");
        fs::write(&path, "# the old one\nendpoint = \"https://c:1\" # at work\n").expect("written");
        let token = save(Some(&path), "lab", context("https://lab:1"), Some("t0ken"));
        let token = token.expect("saved").expect("a file");
        save(Some(&path), "b.c", context("https://b:1"), Some("other")).expect("saved");
        let text = fs::read_to_string(&path).expect("read");
        assert!(
            text.starts_with("# the old one\nendpoint = \"https://c:1\" # at work\n"),
            "{text}"
        );
        let file = read(Some(&path)).expect("valid");
        assert_eq!(file.endpoint.as_deref(), Some("https://c:1"));
        assert_eq!(file.context.as_deref(), Some("b.c"), "the last login is chosen");
        assert_eq!(file.contexts["lab"].token_file.as_deref(), Some(token.as_path()));
        assert_eq!(fs::read_to_string(&token).expect("read"), "t0ken\n");
        assert_eq!((mode(&token), mode(&path)), (0o600, 0o600));
        let commented = text.replace("context = \"b.c\"", "context = \"b.c\" # why");
        let commented = commented
            .replace("endpoint = \"https://lab:1\"", "# ours\nendpoint = \"https://lab:1\" # here");
        fs::write(&path, commented).expect("written");
        save(Some(&path), "lab", context("https://lab:2"), Some("t0ken")).expect("saved again");
        let text = fs::read_to_string(&path).expect("read");
        for kept in ["context = \"lab\" # why", "# ours\nendpoint = \"https://lab:2\" # here"] {
            assert!(text.contains(kept), "{text}");
        }
        let own = Context { client_cert: Some("/own.pem".into()), ..context("https://b:1") };
        assert_eq!(save(Some(&path), "b.c", own, None).expect("saved"), None);
        let file = read(Some(&path)).expect("valid");
        assert_eq!(file.contexts["b.c"].client_cert.as_deref(), Some(Path::new("/own.pem")));
        assert_eq!(file.contexts["b.c"].token_file, None, "and its token is removed");
        assert!(!token.with_file_name("b.c").exists() && token.exists());
        choose(Some(&path), "lab").expect("chosen");
        remove(Some(&path), "lab").expect("removed");
        let file = read(Some(&path)).expect("valid");
        assert_eq!((file.context, file.contexts.len(), token.exists()), (None, 1, false));
        let failure = read(Some(&path)).expect("valid").named("lab").expect_err("gone").to_string();
        assert!(failure.contains("there is no context \"lab\"; there is b.c"), "{failure}");
    }

    #[test]
    fn token_is_shown_in_no_error() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("config.toml");
        for content in ["endpoint = \"https://c:1\"\ntoken = s3cret\n", "ca = \"a\"\ntoken = 53\n"]
        {
            fs::write(&path, content).expect("written");
            let failure = read(Some(&path)).expect_err("invalid").to_string();
            assert!(failure.contains("line 2"), "{failure}");
            assert!(!failure.contains("s3cret") && !failure.contains("= 53"), "{failure}");
        }
    }

    #[test]
    fn link_to_the_configuration_stays_a_link() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (real, link) = (dir.path().join("real.toml"), dir.path().join("config.toml"));
        fs::write(&real, "").expect("written");
        std::os::unix::fs::symlink(&real, &link).expect("linked");
        save(Some(&link), "lab", context("https://lab:1"), Some("t0ken")).expect("saved");
        assert!(link.is_symlink());
        assert!(fs::read_to_string(&real).expect("read").contains("[contexts.lab]"));
    }

    #[test]
    fn names_of_contexts_are_names_of_files() {
        for good in ["lab", "controller.example", "a-b_c", "1"] {
            assert!(is_name(good), "{good}");
        }
        for wrong in ["", ".", "..", "a/b", "-a", "a b", "ä", "\"x", "lab.new"] {
            assert!(!is_name(wrong), "{wrong}");
        }
    }
}
