//! `compare`: compares a list of ids with the sandboxes of the team.

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use clap::Args;
use proto::sandbox::v1::CompareSandboxesRequest;
use serde_json::json;

use crate::{
    client::{Controller, answer},
    exit,
    failure::Failure,
    output::{Output, json},
};

/// Arguments of `compare`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl admin compare known.txt  one id a line, as a backend's database has
                                      them
  psql -Atc 'select id from sandboxes' | sandboxctl admin compare -")]
pub(crate) struct Compare {
    /// File with an id on each line; `-` is stdin
    file: PathBuf,
}

/// Size of a list of ids, bytes, at most: 10000 of them and some room.
const LIST_MAX: u64 = 1 << 20;

pub(super) async fn run(
    controller: Controller,
    args: Compare,
    output: Output,
) -> Result<u8, Failure> {
    let known_ids = read(&args.file)?;
    let request = CompareSandboxesRequest { known_ids };
    let found = answer(controller.sandboxes.clone().compare_sandboxes(request)).await?;
    let same = found.unlisted.is_empty() && found.missing.is_empty();
    if output.json {
        let unlisted: Vec<_> = found.unlisted.iter().map(json::sandbox).collect();
        output.value(&json!({
            "unlisted": unlisted, "missing": found.missing, "complete": found.complete,
        }))?;
    } else {
        for sandbox in &found.unlisted {
            let phase = json::phase(sandbox.phase());
            output.line(format!("+ {} {phase} on {}", sandbox.id, sandbox.node))?;
        }
        for id in &found.missing {
            output.line(format!("- {id}"))?;
        }
        if same {
            output.line("the list is what there is")?;
        }
    }
    if !found.complete {
        output.note("a node does not answer: what is missing may be there");
    }
    Ok(if same { 0 } else { exit::REFUSED })
}

/// Reads the ids of a file, one a line.
fn read(file: &Path) -> Result<Vec<String>, Failure> {
    let mut text = String::new();
    let unread = |error: std::io::Error| {
        Failure::usage(format!("{}: {error}", file.display()), "name a file, or - for stdin")
    };
    if file == Path::new("-") {
        std::io::stdin().take(LIST_MAX).read_to_string(&mut text).map_err(unread)?;
    } else {
        let opened = std::fs::File::open(file).map_err(unread)?;
        opened.take(LIST_MAX).read_to_string(&mut text).map_err(unread)?;
    }
    if text.len() as u64 == LIST_MAX {
        return Err(Failure::usage("the list is too long", "at most 10000 ids, one a line"));
    }
    Ok(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect())
}
