//! `cp`: copies files and directories as tar archives, packed and unpacked in the stream.

mod download;
mod placing;
mod upload;

use std::{
    io,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use archive::{Owner, Rules};
use clap::Args;
use daemon::chain::Chain;
use nix::unistd::{Group, Uid, User};
use proto::{
    exec::check_owner,
    sandbox::v1::{ArchiveStart, DownloadArchiveRequest},
};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::{client::Controller, failure::Failure, output::Output, progress::Bar, signals::Stops};

/// Arguments of `cp`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl cp notes.txt ID:/root/          into a directory
  sandboxctl cp notes.txt ID:/root/todo.txt  under another name
  sandboxctl cp ./src ID:/srv                /srv/src, or /srv where there is
                                             none yet
  sandboxctl cp ./src/. ID:/srv              what is in it, right into /srv
  sandboxctl cp ID:/var/log ./logs           out of it
  sandboxctl cp ID:/srv - | tar t            a tar archive on stdout
  tar c . | sandboxctl cp - ID:/srv          one from stdin

A path of this machine that looks like a sandbox's is written ./A:/b. Links are
copied as links. What is written over keeps its owner and permissions, and what
is new belongs to whoever copies: --user in a sandbox, you here. With -a both
are those of the source, as with `cp -a`. Sockets, pipes and devices are left
out, and named on stderr.")]
pub(crate) struct Cp {
    /// Copy owners (by number, if root copies) and permissions too, also over what is there
    #[arg(short, long)]
    archive: bool,
    /// Owner of everything that is copied, by name or number at the destination; only root can
    #[arg(long, value_name = "USER[:GROUP]", value_parser = owner)]
    chown: Option<String>,
    /// Copy what a link at SRC leads to, and not the link
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// User in the sandbox by name or number [default: root]
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// From where: a path, ID:/path, or - for a tar archive on stdin
    #[arg(value_name = "SRC")]
    pub(super) source: Place,
    /// To where: a path, ID:/path, or - for a tar archive on stdout
    #[arg(value_name = "DST")]
    pub(super) destination: Place,
}

/// One end of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// Path on this machine.
    Here(PathBuf),
    /// Path in a sandbox.
    Sandbox {
        /// Any form of its name.
        id: String,
        /// Absolute path.
        path: String,
    },
    /// Our stdin or stdout.
    Stream,
}

impl Place {
    /// Name of the sandbox, if it is in one.
    pub(super) fn sandbox(&mut self) -> Option<&mut String> {
        match self {
            Self::Sandbox { id, .. } => Some(id),
            Self::Here(_) | Self::Stream => None,
        }
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some((id, path)) if !id.is_empty() && !id.contains(['/', '.']) => {
                if !path.starts_with('/') {
                    return Err("the path in the sandbox must be absolute: ID:/path".into());
                }
                Ok(Self::Sandbox { id: id.to_owned(), path: path.to_owned() })
            }
            _ if text == "-" => Ok(Self::Stream),
            _ if text.is_empty() => Err("must not be empty".into()),
            _ => Ok(Self::Here(text.into())),
        }
    }
}

/// Chunks queued between the archive and the connection.
const QUEUE: usize = 8;
/// Silence after which the controller ends a transfer.
const SILENCE: Duration = Duration::from_secs(45);

/// Rules for what is written here.
const KEPT: Rules = Rules { owner: Owner::Kept, keep_mode: true, follow: false };

/// Result of a copy.
#[derive(Debug)]
struct Copied {
    /// Bytes of the archive.
    bytes: u64,
    /// Files that were left out, and what they are.
    left_out: Vec<String>,
}

fn owner(text: &str) -> Result<String, String> {
    check_owner("owner", text).map_err(|invalid| invalid.why)?;
    if text.is_empty() { Err("must not be empty".into()) } else { Ok(text.to_owned()) }
}

pub(super) async fn run(controller: Controller, cp: Cp, output: Output) -> Result<u8, Failure> {
    let Cp { archive, chown, follow_link, user, source, destination } = cp;
    let user = user.unwrap_or_default();
    let mut stops = Stops::listen()?;
    let (id, copied) = match (source, destination) {
        (Place::Sandbox { id, path: from }, to @ (Place::Here(_) | Place::Stream)) => {
            let bar = Bar::new(output.json, format!("copying {from}"), None);
            let path = match follow_link {
                true => tokio::select! {
                    biased;
                    stop = stops.next() => {
                        return Err(Failure::local("the copy was interrupted").exit(stop.exit()));
                    }
                    found = placing::resolve(&controller, (&id, &user), &from) => found?.0,
                },
                false => from.clone(),
            };
            let request = DownloadArchiveRequest { id: id.clone(), path, user };
            let rules = rules(archive, chown.as_deref())?;
            let download = download::Download { request, from, to, rules };
            (id, download::run(&controller, download, &mut stops, bar).await?)
        }
        (from @ (Place::Here(_) | Place::Stream), Place::Sandbox { id, path }) => {
            let (owner, keep_existing) = (chown.unwrap_or_default(), !archive);
            let start = ArchiveStart { id: id.clone(), path, user, owner, keep_existing };
            // The sandbox drops what is not whole when the call ends.
            tokio::select! {
                biased;
                stop = stops.next() => {
                    return Err(Failure::local("the copy was interrupted").exit(stop.exit()));
                }
                copied = upload::run(&controller, from, start, follow_link, output) => (id, copied?),
            }
        }
        _ => {
            return Err(Failure::usage(
                "exactly one of source and destination must be in a sandbox",
                "write its path as ID:/path; `sandboxctl cp --help` has examples",
            ));
        }
    };
    let Copied { bytes, left_out } = copied;
    if output.json {
        output.value(&json!({ "id": id, "archive_bytes": bytes, "left_out": left_out }))?;
    }
    for file in left_out {
        output.note(format!("left out: {file}"));
    }
    Ok(0)
}

/// Chooses the rules for a copy to this machine.
fn rules(archive: bool, chown: Option<&str>) -> Result<Rules, Failure> {
    let owner = match chown {
        Some(owner) => local_owner(owner)?,
        None if archive => Owner::Archive,
        None => Owner::Kept,
    };
    Ok(Rules { owner, keep_mode: !archive, ..KEPT })
}

/// Looks up an owner on this machine.
fn local_owner(text: &str) -> Result<Owner, Failure> {
    let unknown =
        || Failure::usage(format!("this machine has no owner {text}"), "see `getent passwd`");
    let (user, group) = text.split_once(':').map_or((text, None), |(u, g)| (u, Some(g)));
    let found = match user.parse() {
        Ok(id) => User::from_uid(Uid::from_raw(id)).ok().flatten(),
        Err(_) => User::from_name(user).ok().flatten(),
    };
    // A number needs no entry.
    let uid = found.as_ref().map(|user| user.uid.as_raw()).or_else(|| user.parse().ok());
    let uid = uid.ok_or_else(unknown)?;
    let gid = match group {
        None => Some(found.map_or(uid, |user| user.gid.as_raw())),
        Some(group) => group
            .parse()
            .ok()
            .or_else(|| Some(Group::from_name(group).ok().flatten()?.gid.as_raw())),
    };
    Ok(Owner::Given(uid, gid.ok_or_else(unknown)?))
}

fn failed(error: archive::Error) -> Failure {
    Failure::local(error.to_string())
}

fn local(path: &Path, error: &io::Error) -> Failure {
    Failure::local(format!("{}: {}", path.display(), Chain(error)))
}

async fn joined<T>(task: JoinHandle<T>) -> Result<T, Failure> {
    task.await.map_err(|error| Failure::local(format!("the copying failed: {error}")))
}

#[cfg(test)]
mod tests {
    use super::{super::parse, *};

    #[test]
    fn cp_parses_paths_sandboxes_and_streams() {
        let cp: Cp = parse("./a:b pvelxc-x:/srv").expect("two places");
        assert_eq!(cp.source, Place::Here("./a:b".into()));
        let path = "/srv".to_owned();
        assert_eq!(cp.destination, Place::Sandbox { id: "pvelxc-x".into(), path });
        assert_eq!("-".parse(), Ok(Place::Stream));
        for wrong in ["a 100001:srv", "a"] {
            assert!(parse::<Cp>(wrong).is_err(), "{wrong}");
        }
    }
}
