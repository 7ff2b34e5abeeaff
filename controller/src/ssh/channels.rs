//! Channels of one connection: how many are open, how many russh keeps, and those that we have asked the client
//! to open.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use daemon::sync::Mutex;
use russh::ChannelId;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::inputs::Inputs;

/// Most channels of a connection at the same time.
const OPEN_MAX: usize = 64;
/// Most channels that russh keeps for a connection: it forgets only those that the client was the first to
/// close. With about 4 KiB for each, that is as much as the bytes that may wait.
pub(crate) const KEPT_MAX: usize = 2048;
/// Reason that a client is told when its connection takes no other channels.
pub(super) const WORN: &str = "this connection has had too many channels; connect again";

/// Place of an open channel among those of its connection.
#[derive(Debug)]
pub(super) struct Place {
    /// Dropped before the word that it is free.
    _permit: OwnedSemaphorePermit,
    _freed: Freed,
}

/// Tells at its end that a place is free.
#[derive(Debug)]
struct Freed(Arc<Notify>);

impl Drop for Freed {
    fn drop(&mut self) {
        self.0.notify_waiters();
    }
}

/// Channel that the client has opened for us.
#[derive(Debug)]
pub(super) struct Confirmed {
    pub(super) inputs: Inputs,
    pub(super) place: Arc<Place>,
}

#[derive(Debug, Default)]
struct Asked {
    /// Places of the channels that the client has not answered: the request does not tell its number.
    places: Vec<Place>,
    confirmed: HashMap<ChannelId, Confirmed>,
}

/// Channels of a connection.
#[derive(Debug)]
pub(super) struct Channels {
    places: Arc<Semaphore>,
    /// Told after each channel that has ended.
    freed: Arc<Notify>,
    /// Channels that were accepted and that the client has not closed: russh keeps those that we have closed.
    kept: AtomicUsize,
    asked: Mutex<Asked>,
    answered: Notify,
}

impl Default for Channels {
    fn default() -> Self {
        Self {
            places: Arc::new(Semaphore::new(OPEN_MAX)),
            freed: Arc::default(),
            kept: AtomicUsize::default(),
            asked: Mutex::default(),
            answered: Notify::default(),
        }
    }
}

impl Channels {
    /// Takes a place for a channel. `None`: too many are open, or russh keeps too many.
    pub(super) fn take(&self) -> Option<Place> {
        if self.are_worn() {
            return None;
        }
        self.places.clone().try_acquire_owned().ok().map(|permit| self.place(permit))
    }

    /// Takes a place for a channel as soon as one is free. `None`: russh keeps too many.
    pub(super) async fn wait(&self) -> Option<Place> {
        if self.are_worn() {
            return None;
        }
        let permit = self.places.clone().acquire_owned().await.ok()?;
        let place = self.place(permit);
        // Those that were open before may have been the last.
        (!self.are_worn()).then_some(place)
    }

    fn place(&self, permit: OwnedSemaphorePermit) -> Place {
        Place { _permit: permit, _freed: Freed(self.freed.clone()) }
    }

    /// Counts a channel that is accepted.
    pub(super) fn keep(&self) {
        self.kept.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a channel that the client has closed: russh has forgotten it.
    pub(super) fn forget(&self) {
        self.kept.fetch_sub(1, Ordering::Relaxed);
    }

    /// Returns true when russh keeps so many channels that the connection takes no others.
    pub(super) fn are_worn(&self) -> bool {
        self.kept.load(Ordering::Relaxed) >= KEPT_MAX
    }

    /// Returns true when no channel is open.
    fn are_idle(&self) -> bool {
        self.places.available_permits() == OPEN_MAX
    }

    /// Waits until the connection takes no other channels, and none is open.
    pub(super) async fn worn_out(&self) {
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            // From here on no end of a channel is missed. Each is counted while it is open.
            freed.as_mut().enable();
            if self.are_worn() && self.are_idle() {
                return;
            }
            freed.await;
        }
    }

    /// Notes that the client is asked to open a channel.
    pub(super) fn ask(&self, place: Place) {
        self.asked.lock().places.push(place);
    }

    /// Gives up the place of a channel that the client has refused to open.
    pub(super) fn refused(&self) {
        // All places are alike.
        drop(self.asked.lock().places.pop());
    }

    /// Notes that the client has opened a channel. `None`: it was not asked to.
    pub(super) fn confirm(&self, id: ChannelId, inputs: Inputs) -> Option<Weak<Place>> {
        let mut asked = self.asked.lock();
        let place = Arc::new(asked.places.pop()?);
        let weak = Arc::downgrade(&place);
        asked.confirmed.insert(id, Confirmed { inputs, place });
        drop(asked);
        self.keep();
        self.answered.notify_waiters();
        Some(weak)
    }

    /// Takes a channel that the client has opened. russh may tell of it before `confirm`.
    pub(super) async fn claim(&self, id: ChannelId) -> Confirmed {
        loop {
            let mut answered = std::pin::pin!(self.answered.notified());
            // From here on no answer is missed.
            answered.as_mut().enable();
            if let Some(confirmed) = self.asked.lock().confirmed.remove(&id) {
                return confirmed;
            }
            answered.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn connection_takes_so_many_channels_at_once_and_so_many_in_all() {
        let channels = Channels::default();
        let places: Vec<_> = std::iter::from_fn(|| channels.take()).collect();
        assert_eq!(places.len(), OPEN_MAX);
        drop(places);
        assert!(channels.are_idle());
        for _ in 0..KEPT_MAX {
            drop(channels.take().expect("a place"));
            channels.keep();
        }
        assert!(channels.take().is_none() && channels.are_worn());
        channels.forget();
        assert!(channels.take().is_some(), "the client has closed one");
    }

    #[test]
    fn connection_is_worn_out_when_the_last_of_too_many_channels_ends() {
        let channels = Channels::default();
        let place = channels.take().expect("a place");
        for _ in 0..KEPT_MAX {
            channels.keep();
        }
        let mut worn_out = std::pin::pin!(channels.worn_out());
        assert!(worn_out.as_mut().now_or_never().is_none(), "one is open");
        drop(place);
        assert!(worn_out.now_or_never().is_some());
    }

    #[test]
    fn who_waits_for_a_place_gets_the_next_that_is_free() {
        let channels = Channels::default();
        let mut places: Vec<_> = std::iter::from_fn(|| channels.take()).collect();
        let mut waits = std::pin::pin!(channels.wait());
        assert!(waits.as_mut().now_or_never().is_none());
        drop(places.pop());
        assert!(channels.take().is_none(), "it is another's");
        assert!(waits.now_or_never().flatten().is_some());
    }

    #[test]
    fn place_of_a_refused_channel_is_free_again() {
        let channels = Channels::default();
        channels.ask(channels.take().expect("a place"));
        assert!(!channels.are_idle());
        channels.refused();
        assert!(channels.are_idle());
    }
}
