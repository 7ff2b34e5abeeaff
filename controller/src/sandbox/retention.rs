//! Retention of the store: ended sandboxes with their request_ids, and events. What is removed for its age is lost for
//! good, so a wall clock that went ahead is not believed at once.

use std::time::Duration;

use proto::name::Team;
use tokio::time::{MissedTickBehavior, interval};

use super::Sandboxes;
use crate::{
    clock::{Ages, Now},
    events, store,
};

/// Retention of an ended sandbox and its request_id.
const RETENTION: Duration = Duration::from_hours(24);
const SWEEP: Duration = Duration::from_mins(10);
/// How far the wall clock may get ahead from one sweep to the next. So much longer is everything kept.
const SLACK: Duration = Duration::from_hours(1);
/// Number of the newest events that tell how the clock went before the start.
const TELLING: u32 = 100_000;
/// Most events removed in one write.
const PRUNE: u32 = 2000;

impl Sandboxes {
    pub(super) async fn retention_loop(&self) {
        let mut ages = None;
        let mut ticks = interval(SWEEP);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            match self.time_of_ages(&mut ages).await {
                Ok(now_ms) => self.remove_old(now_ms).await,
                Err(error) => tracing::error!(%error, "could not read the times of events"),
            }
            if let Err(error) = self.drop_surplus_events().await {
                tracing::error!(%error, "could not remove events beyond the shares of the teams");
            }
        }
    }

    /// Returns the time by which ages are told: that of the wall clock or, while that is doubtful, what has passed since
    /// it was right.
    async fn time_of_ages(&self, ages: &mut Option<Ages>) -> Result<u64, store::Error> {
        let run_ms = daemon::clock::millis(self.started.elapsed());
        let now = Now { wall_ms: self.clock.now_ms(), run_ms };
        let ages = match ages {
            Some(ages) => ages,
            None => {
                let hours = self.store.event_hours(TELLING).await?.into_iter();
                let times = hours.map(|hour| hour.saturating_mul(store::HOUR_MS));
                ages.insert(Ages::new(times, now, SLACK, RETENTION))
            }
        };
        let were_doubtful = ages.are_doubtful();
        if ages.are_true(now) {
            return Ok(now.wall_ms);
        }
        if !were_doubtful {
            tracing::warn!(
                "the clock may have gone ahead; old sandboxes and events are removed by the time that has passed since \
                 it was right, until the clock is set back or has been so for a week"
            );
        }
        Ok(ages.expected_ms(now))
    }

    async fn remove_old(&self, now_ms: u64) {
        let before = |age: Duration| now_ms.saturating_sub(daemon::clock::millis(age + SLACK));
        match self.store.forget(before(RETENTION)).await {
            Ok(ids) => self.nodes.cache.forget(&ids),
            Err(error) => tracing::error!(%error, "could not remove old creations"),
        }
        if let Err(error) = self.prune_events(before(self.retention.keep)).await {
            tracing::error!(%error, "could not remove old events");
        }
    }

    /// Removes old events in batches, so that other writes come in between.
    async fn prune_events(&self, before_ms: u64) -> Result<(), store::Error> {
        while self.store.prune_events(before_ms, PRUNE).await? > 0 {}
        Ok(())
    }

    /// Removes the events beyond the shares of the teams, likewise.
    async fn drop_surplus_events(&self) -> Result<(), store::Error> {
        let counts = self.store.event_counts().await?;
        let max_of = |team: &Team| self.quotas.events_max(team);
        for (share, mut many) in events::surplus(counts, max_of, self.retention.max) {
            while many > 0 {
                let batch = u32::try_from(many).unwrap_or(u32::MAX).min(PRUNE);
                self.store.drop_events(share.clone(), batch).await?;
                many -= u64::from(batch);
            }
        }
        Ok(())
    }
}
