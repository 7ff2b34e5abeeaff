//! `man`: writes the manual pages, made from the texts of `--help`.

use std::path::PathBuf;

use clap::CommandFactory;

use crate::{args::Args, failure::Failure, output::Output};

pub(super) fn run(dir: Option<PathBuf>, output: Output) -> Result<u8, Failure> {
    match dir {
        Some(dir) => {
            let failed = |error: std::io::Error| {
                Failure::local(format!("cannot write the man pages to {}: {error}", dir.display()))
            };
            std::fs::create_dir_all(&dir).map_err(failed)?;
            clap_mangen::generate_to(Args::command(), &dir).map_err(failed)?;
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Args::command()).render(&mut page)?;
            output.line(String::from_utf8_lossy(&page).trim_end())?;
        }
    }
    Ok(0)
}
