//! Destination of a command's output: our own stdout and stderr, memory, or lines of JSON.

use std::{
    io::{self, Write},
    os::fd::AsFd,
};

use tokio::{fs::File, io::AsyncWriteExt};

use crate::{failure::Failure, log_lines::LogLines, printable};

/// Bytes of output that are held in memory at most.
const HELD_MAX: usize = 16 * 1024 * 1024;

/// Destination of output.
#[derive(Debug)]
pub struct Sink {
    form: Form,
    /// Collected stdout.
    pub stdout: Vec<u8>,
    /// Collected stderr.
    pub stderr: Vec<u8>,
    // Files of tokio: a slow reader of ours must not delay the connection's pings.
    to_stdout: File,
    to_stderr: File,
}

#[derive(Debug)]
enum Form {
    /// Bytes as they come.
    Bytes,
    /// Memory, for one object at the end.
    Held,
    /// An object for each line, and the offsets behind what came.
    Lines([LogLines; 2], [u64; 2]),
}

impl Sink {
    /// Creates a sink to our own stdout and stderr, or to memory for `--json`.
    ///
    /// # Errors
    /// When they are closed.
    pub fn new(json: bool) -> io::Result<Self> {
        Self::of(if json { Form::Held } else { Form::Bytes })
    }

    /// Creates a sink that prints an object for each line on stdout.
    ///
    /// # Errors
    /// When stdout is closed.
    pub fn lines() -> io::Result<Self> {
        Self::of(Form::Lines(["stdout", "stderr"].map(LogLines::new), [0; 2]))
    }

    fn of(form: Form) -> io::Result<Self> {
        let to_stdout = io::stdout().as_fd().try_clone_to_owned()?;
        let to_stderr = io::stderr().as_fd().try_clone_to_owned()?;
        io::stdout().flush()?;
        Ok(Self {
            form,
            stdout: Vec::new(),
            stderr: Vec::new(),
            to_stdout: File::from_std(to_stdout.into()),
            to_stderr: File::from_std(to_stderr.into()),
        })
    }

    /// Takes output that begins at this offset.
    ///
    /// # Errors
    /// When it cannot be written, or is more than is held.
    pub async fn take(
        &mut self,
        bytes: &[u8],
        offset: u64,
        is_stderr: bool,
    ) -> Result<(), Failure> {
        match &mut self.form {
            Form::Bytes if is_stderr => write(&mut self.to_stderr, bytes).await,
            Form::Bytes => write(&mut self.to_stdout, bytes).await,
            Form::Lines(lines, ends) => {
                let n = usize::from(is_stderr);
                ends[n] = offset + bytes.len() as u64;
                let values = lines[n].take(offset, bytes);
                objects(&mut self.to_stdout, &values).await
            }
            Form::Held => self.hold(bytes, is_stderr),
        }
    }

    fn hold(&mut self, bytes: &[u8], is_stderr: bool) -> Result<(), Failure> {
        if self.stdout.len() + self.stderr.len() + bytes.len() > HELD_MAX {
            return Err(Failure::local(
                "the command wrote more than 16 MiB, which is more than --json holds",
            )
            .hint("leave out --json: the output is then printed as it comes"));
        }
        let kept = if is_stderr { &mut self.stderr } else { &mut self.stdout };
        kept.extend_from_slice(bytes);
        Ok(())
    }

    /// Prints what waited for the rest of a character.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn end(&mut self) -> Result<(), Failure> {
        let Form::Lines(lines, ends) = &mut self.form else { return Ok(()) };
        let left: Vec<_> =
            lines.iter_mut().zip(*ends).filter_map(|(lines, end)| lines.end(end)).collect();
        objects(&mut self.to_stdout, &left).await
    }
}

async fn objects(to: &mut File, values: &[serde_json::Value]) -> Result<(), Failure> {
    let mut text = String::new();
    for value in values {
        text.push_str(&printable::json(value)?);
        text.push('\n');
    }
    write(to, text.as_bytes()).await
}

async fn write(to: &mut File, bytes: &[u8]) -> Result<(), Failure> {
    to.write_all(bytes).await?;
    Ok(to.flush().await?)
}
