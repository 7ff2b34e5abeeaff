//! `man`: writes the manual pages, made from the texts of `--help`.

use std::path::PathBuf;

use clap::{Args, Command};

use crate::{failure::Failure, output::Output};

/// Arguments of `man`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl man | man -l -
  sandboxctl man /usr/local/share/man/man1")]
pub(crate) struct Man {
    /// Folder; created if it is not there
    dir: Option<PathBuf>,
}

pub(super) fn run(definition: Command, Man { dir }: Man, output: Output) -> Result<u8, Failure> {
    match dir {
        Some(dir) => {
            let failed = |error: std::io::Error| {
                Failure::local(format!("cannot write the man pages to {}: {error}", dir.display()))
            };
            std::fs::create_dir_all(&dir).map_err(failed)?;
            clap_mangen::generate_to(definition, &dir).map_err(failed)?;
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(definition).render(&mut page)?;
            output.line(String::from_utf8_lossy(&page).trim_end())?;
        }
    }
    Ok(0)
}
