//! Runs the behaviours: each is tried, whatever the result of the one before, and the remnants of
//! each are removed before the next. A skipped one is never reported as a success.

use std::{fmt, panic::AssertUnwindSafe, time::Duration};

use futures_util::FutureExt as _;
use tokio::time::timeout;

use crate::{
    behaviour::Behaviour,
    stage::{Shown, Stage},
};

/// Longest run of a behaviour, after which it has failed; its calls have deadlines of 2 minutes.
const BEHAVIOUR: Duration = Duration::from_secs(900);
/// Longest removal of a behaviour's remnants.
const CLEANING: Duration = Duration::from_secs(300);

/// Results of the behaviours.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) shown: Vec<&'static str>,
    /// Names, and what each needs.
    pub(crate) skipped: Vec<(&'static str, &'static str)>,
    /// Names, and the first line of each reason.
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

/// Runs all behaviours, and prints the result of each.
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
        // Also after one that was shown or skipped: it may have forgotten something.
        if let Err(why) = tried(timeout(CLEANING, stage.clean_up()), "cleaning up hangs").await {
            println!("  NOT CLEANED UP: {why}");
            tally.failed.push((name, format!("what it left was not removed: {why}")));
        }
    }
    tally
}

/// Returns the result of work that may panic or hang.
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
