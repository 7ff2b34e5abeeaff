//! Going through the behaviours: each is tried, whatever became of the one before, and what one that
//! failed has left is removed before the next. Nothing that was skipped looks like a success.

use std::{fmt, panic::AssertUnwindSafe, time::Duration};

use futures_util::FutureExt as _;
use tokio::time::timeout;

use crate::{
    behaviour::Behaviour,
    stage::{Shown, Stage},
};

/// One that hangs longer than this has failed: all of its calls have deadlines of 2 minutes.
const BEHAVIOUR: Duration = Duration::from_secs(900);
/// Removing what one has left, which must not hang either.
const CLEANING: Duration = Duration::from_secs(300);

/// Outcomes of the behaviours.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) shown: Vec<&'static str>,
    /// Name, and what it needs.
    pub(crate) skipped: Vec<(&'static str, &'static str)>,
    /// Name, and the first line of why.
    pub(crate) failed: Vec<(&'static str, String)>,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { shown, skipped, failed } = self;
        let all = shown.len() + skipped.len() + failed.len();
        write!(
            f,
            "{all} behaviours: {} shown, {} skipped, {} failed",
            shown.len(),
            skipped.len(),
            failed.len()
        )?;
        for (name, what) in skipped {
            write!(f, "; skipped {name}: needs {what}")?;
        }
        for (name, why) in failed {
            write!(f, "; failed {name}: {why}")?;
        }
        Ok(())
    }
}

/// Tries all of them, and says of each what became of it.
pub(crate) async fn run(stage: &dyn Stage, behaviours: impl Iterator<Item = &Behaviour>) -> Tally {
    let mut tally = Tally::default();
    for (name, show) in behaviours {
        println!("{name}");
        match tried(timeout(BEHAVIOUR, show(stage)), "it hangs").await {
            Ok(Shown::Yes) => tally.shown.push(name),
            Ok(Shown::NotHere(what)) => {
                println!("  SKIPPED: needs {what}");
                tally.skipped.push((name, what));
            }
            Err(why) => {
                println!("  FAILED: {why}");
                tally.failed.push((name, why));
            }
        }
        // Also of one that was shown or skipped: it may have forgotten something.
        if let Err(why) = tried(timeout(CLEANING, stage.clean_up()), "cleaning up hangs").await {
            println!("  NOT CLEANED UP: {why}");
            tally.failed.push((name, format!("what it left was not removed: {why}")));
        }
    }
    tally
}

/// The outcome of something that may panic or hang.
async fn tried<T>(
    work: impl Future<Output = Result<T, tokio::time::error::Elapsed>>,
    hangs: &str,
) -> Result<T, String> {
    match AssertUnwindSafe(work).catch_unwind().await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(_)) => Err(hangs.to_owned()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text =
                text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked");
            Err(text.lines().next().unwrap_or_default().to_owned())
        }
    }
}
