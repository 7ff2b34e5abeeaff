//! `ssh-key`: adds, lists and removes the SSH keys of a team.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use proto::sandbox::v1::{AddSshKeyRequest, ListSshKeysRequest, RemoveSshKeyRequest, SshKey};
use serde_json::{Value, json};

use super::validity::{self, Terms, Validity};
use crate::{
    client::{Controller, answer, promised, read},
    failure::Failure,
    listing::Listing,
    output::{
        Output,
        layout::{Column, Fit},
        table::{self, Table},
    },
};

/// Most bytes of a file with a public key.
const KEY_BYTES_MAX: u64 = 16 * 1024;
/// Keys of the user that are looked for, the first one that is there wins.
const USUAL: [&str; 4] = ["id_ed25519.pub", "id_ecdsa.pub", "id_ed25519_sk.pub", "id_ecdsa_sk.pub"];

/// Verbs of `ssh-key`.
#[derive(Debug, Subcommand)]
pub(crate) enum SshKeyVerb {
    /// Let a key log in to the sandboxes of the team
    Add(Add),
    /// List the keys of the team
    #[command(visible_alias = "list")]
    Ls(Ls),
    /// Remove a key, and end its sessions at once
    #[command(visible_alias = "remove")]
    Rm(Rm),
}

/// Arguments of `ssh-key add`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl ssh-key add  your own key: ~/.ssh/id_ed25519.pub
  sandboxctl ssh-key add laptop.pub --name laptop --expires 90d
  ssh-keygen -t ed25519 && sandboxctl ssh-key add

The key opens every sandbox of the team: commands, terminals, files and
forwards. Only the public key is sent. RSA keys are not taken. Then:
`sandboxctl ssh-config --write`, and `ssh NAME`.")]
pub(crate) struct Add {
    /// File with the public key, or - for stdin [default: the first of ~/.ssh/id_*.pub]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Name of the key, unique in the team [default: its id]
    #[arg(long)]
    name: Option<String>,
    /// For whom it is, and for how long.
    #[command(flatten)]
    terms: Terms,
    /// Team of the key, for operators [default: that of your own token]
    #[arg(long)]
    team: Option<String>,
}

/// Arguments of `ssh-key ls`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl ssh-key ls     the living keys of your team
  sandboxctl ssh-key ls -a  also those that are removed or expired")]
pub(crate) struct Ls {
    /// Also keys that are removed or expired
    #[arg(short, long)]
    all: bool,
    /// Team of the keys, for operators [default: that of your own token]
    #[arg(long)]
    team: Option<String>,
    /// Flags of the list.
    #[command(flatten)]
    listing: Listing,
}

/// Arguments of `ssh-key rm`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl ssh-key rm laptop                  by its name
  sandboxctl ssh-key rm 3f9c0a1b2c3d            by its id
  sandboxctl ssh-key rm SHA256:...              by its fingerprint

Sessions that the key has opened end within a second.")]
pub(crate) struct Rm {
    /// Name, id or fingerprint of the key
    #[arg(value_name = "KEY")]
    key: String,
    /// Team of the key, for operators [default: that of your own token]
    #[arg(long)]
    team: Option<String>,
}

const COLUMNS: &[Column] = &[
    Column::new("ID"),
    Column::new("NAME").fit(Fit::Cut(12)),
    Column::new("USER").rank(3).fit(Fit::Cut(10)),
    Column::new("FINGERPRINT").rank(4).fit(Fit::Cut(20)),
    validity::STATE,
    validity::CREATED,
    validity::EXPIRES.rank(2),
    validity::USED,
];

pub(super) async fn run(
    controller: Controller,
    verb: SshKeyVerb,
    output: Output,
) -> Result<u8, Failure> {
    match verb {
        SshKeyVerb::Add(args) => add(controller, args, output).await,
        SshKeyVerb::Ls(args) => ls(controller, args, output).await,
        SshKeyVerb::Rm(args) => rm(controller, args, output).await,
    }
}

/// Finds the user's own public key.
fn own_key() -> Result<PathBuf, Failure> {
    let dir = home()?.join(".ssh");
    let found = USUAL.iter().map(|name| dir.join(name)).find(|path| path.exists());
    found.ok_or_else(|| {
        Failure::usage(
            format!("there is no public key in {}", dir.display()),
            "`ssh-keygen -t ed25519` makes one; or name the file",
        )
    })
}

/// Returns the user's home.
pub(super) fn home() -> Result<PathBuf, Failure> {
    let home = std::env::home_dir().filter(|home| home.is_absolute());
    home.ok_or_else(|| Failure::usage("there is no home directory", "set HOME"))
}

fn read_key(path: &Path) -> Result<String, Failure> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().take(KEY_BYTES_MAX).read_to_string(&mut text)
    } else {
        File::open(path).and_then(|file| file.take(KEY_BYTES_MAX).read_to_string(&mut text))
    };
    read.map_err(|error| {
        let message = format!("cannot read {}: {error}", path.display());
        Failure::usage(message, "name the file with the public key, which ends with .pub")
    })?;
    if text.contains("PRIVATE KEY") {
        return Err(Failure::usage(
            format!("{} is a private key, and was not sent", path.display()),
            "name the public key, which is in the file with .pub at the end",
        ));
    }
    Ok(text)
}

async fn add(controller: Controller, args: Add, output: Output) -> Result<u8, Failure> {
    let path = match args.file {
        Some(path) => path,
        None => own_key()?,
    };
    let (user, ttl) = args.terms.into_request();
    let request = AddSshKeyRequest {
        team: args.team.unwrap_or_default(),
        name: args.name.unwrap_or_default(),
        user,
        public_key: read_key(&path)?.trim().to_owned(),
        ttl,
    };
    let key = promised(answer(controller.operator.clone().add_ssh_key(request)).await?.key)?;
    if output.json {
        output.value(&value(&key))?;
        return Ok(0);
    }
    output.line(format!("{} ({}) of team {}: {}", key.name, key.id, key.team, key.fingerprint))?;
    output.note("`sandboxctl ssh-config --write` prepares `ssh NAME`");
    Ok(0)
}

async fn ls(controller: Controller, args: Ls, output: Output) -> Result<u8, Failure> {
    let mut request = ListSshKeysRequest {
        team: args.team.unwrap_or_default(),
        include_ended: args.all,
        ..ListSshKeysRequest::default()
    };
    let mut keys = Vec::new();
    loop {
        let call = || {
            let (mut client, request) = (controller.operator.clone(), request.clone());
            async move { client.list_ssh_keys(request).await }
        };
        let page = read(call).await?;
        keys.extend(page.keys);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let values: Vec<_> = keys.iter().map(value).collect();
    let empty = "no SSH keys; `sandboxctl ssh-key add` adds yours";
    args.listing.print(output, table(&keys), &values, empty)?;
    Ok(0)
}

async fn rm(controller: Controller, Rm { key, team }: Rm, output: Output) -> Result<u8, Failure> {
    let request = RemoveSshKeyRequest { key, team: team.unwrap_or_default() };
    let removed = answer(controller.operator.clone().remove_ssh_key(request)).await?;
    let key = promised(removed.key)?;
    if output.json {
        output.value(&value(&key))?;
    } else {
        output.line(format!("{} ({}) of team {} is removed", key.name, key.id, key.team))?;
    }
    Ok(0)
}

fn validity(key: &SshKey) -> Validity {
    Validity {
        created: key.created_at,
        expires: key.expires_at,
        used: key.used_at,
        ended: key.removed_at,
        end: "removed",
    }
}

fn table(keys: &[SshKey]) -> Table {
    let mut table = Table::new(COLUMNS);
    for key in keys {
        let mut row = vec![
            table::cell(&key.id),
            table::cell(&key.name),
            table::cell(&key.user),
            table::cell(&key.fingerprint),
        ];
        row.extend(validity(key).cells());
        table.row(row);
    }
    table
}

/// JSON of a key.
fn value(key: &SshKey) -> Value {
    let mut value = json!({
        "id": key.id,
        "name": key.name,
        "team": key.team,
        "user": key.user,
        "public_key": key.public_key,
        "fingerprint": key.fingerprint,
        "added_by": key.added_by,
    });
    validity(key).add_to(&mut value);
    value
}
