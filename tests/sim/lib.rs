//! The shipped controller and agents in one process, over a fake PVE, in-memory streams, journals
//! that lose unsynced writes, and simulated time. All events come from one seed.
//!
//! A story can be run with a mutant, which leaves out one thing that an invariant depends on. The
//! story must then fail; otherwise the checks are worth nothing.

mod access;
mod calls;
mod chance;
mod check;
mod clock;
mod cluster;
mod doors;
mod drains;
mod lives;
pub mod mutant;
mod net;
mod operator;
mod pipe;
mod story;
mod watch;
mod weather;

use std::{any::Any, panic::AssertUnwindSafe, time::Duration};

pub use mutant::Mutant;
pub use story::Told;

/// Longest simulated time of a story, which normally ends long before.
const STORY_MAX: Duration = Duration::from_secs(4 * 3600);

/// Violations at the end of a story.
#[derive(Debug)]
pub struct Broken(pub Vec<String>);

/// Runs the story of a seed and checks its end.
///
/// # Errors
/// The violations, each with the invariant that it breaks.
pub fn tell(seed: u64, mutant: Option<&Mutant>) -> Result<Told, Broken> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .map_err(|error| Broken(vec![format!("no runtime: {error}")]))?;
    let story = AssertUnwindSafe(|| {
        runtime.block_on(async {
            let story = Box::pin(story::tell(seed, mutant));
            let endless = |_| Err(Broken(vec!["I9: the story does not end".into()]));
            tokio::time::timeout(STORY_MAX, story).await.unwrap_or_else(endless)
        })
    });
    std::panic::catch_unwind(story).unwrap_or_else(|panic| Err(Broken(vec![said(&*panic)])))
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no words");
    format!("panic: {text}")
}
