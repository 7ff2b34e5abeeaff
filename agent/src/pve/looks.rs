//! Looks at what tenants make: the processes, cgroups and sockets of a container. Root in a container decides
//! how long such a look takes, within the look's own limits. So a container has one at a time, and all of them
//! together a few: the other threads for blocking calls stay for /etc/pve.
//!
//! The thread that looks holds the places, not the caller: one that gives up makes room for nobody.

use std::{collections::HashMap, sync::Arc, time::Duration};

use daemon::{
    keyed_lock::{Guard, KeyedLock},
    sync::Mutex,
};
use proto::id::Vmid;
use tokio::{
    sync::{OnceCell, OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
    time::timeout,
};

/// Most concurrent looks. The agent has as many threads for them alone.
pub const LOOKS_MAX: usize = 4;

/// Longest wait for a place. A look takes little more than a second at the worst, so some 60 containers of
/// tenants who mean harm may be in front.
const WAIT: Duration = Duration::from_secs(20);

/// Places of looks. Clones share them.
#[derive(Debug, Clone)]
pub struct Looks {
    /// Turns of the containers.
    turns: KeyedLock<Vmid>,
    places: Arc<Semaphore>,
    /// Turn of looks at all tenants together, beside a place: one that hangs must not take all places.
    all: Arc<Semaphore>,
    /// Place of what waits for a disk, beside its place among all.
    slow: Arc<Semaphore>,
}

impl Default for Looks {
    fn default() -> Self {
        Self {
            turns: KeyedLock::default(),
            places: Arc::new(Semaphore::new(LOOKS_MAX)),
            all: Arc::new(Semaphore::new(1)),
            slow: Arc::new(Semaphore::new(1)),
        }
    }
}

/// Turn of a container, and a place.
#[derive(Debug)]
struct Turn {
    _container: Guard<Vmid>,
    _place: OwnedSemaphorePermit,
}

impl Looks {
    /// Looks at a container; `None` when its turn does not come in time.
    pub async fn at<T: Send + 'static>(
        &self,
        vmid: Vmid,
        look: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let turn = self.turn(vmid).await?;
        on_thread(turn, look).await
    }

    /// Looks at what all tenants make together, such as the processes of the host, one look at a time; `None` when
    /// there is no place in time, or the look takes too long.
    pub async fn at_all<T: Send + 'static>(
        &self,
        look: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let places = self.place_in(&self.all).await?;
        // A process of the host whose memory is locked can hold up the thread for as long as it likes.
        timeout(WAIT, on_thread(places, look)).await.ok().flatten()
    }

    /// Runs what waits for a disk in a tenant's place, one at a time; `None` when there is no place in time.
    pub async fn slow<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let places = self.place_in(&self.slow).await?;
        on_thread(places, work).await
    }

    /// Waits for a turn, and for a place among all; `None` when they do not come in time.
    async fn place_in(&self, turn: &Arc<Semaphore>) -> Option<[OwnedSemaphorePermit; 2]> {
        let places = async {
            let turn = Arc::clone(turn).acquire_owned().await.ok()?;
            Some([turn, self.place().await?])
        };
        timeout(WAIT, places).await.ok().flatten()
    }

    async fn turn(&self, vmid: Vmid) -> Option<Turn> {
        let turn = async {
            let container = self.turns.lock(vmid).await;
            Some(Turn { _container: container, _place: self.place().await? })
        };
        let turn = timeout(WAIT, turn).await;
        turn.unwrap_or_else(|_| {
            tracing::warn!(%vmid, "no slot came free in time to inspect the container");
            None
        })
    }

    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).acquire_owned().await.ok()
    }
}

/// Runs `look` on a thread that may wait, which holds the places; `None` when there is no thread any more.
async fn on_thread<T: Send + 'static>(
    places: impl Send + 'static,
    look: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let look = spawn_blocking(move || {
        let _held = places;
        look()
    });
    look.await.ok()
}

/// Looks that begin later, by container: whoever asks before one begins gets its result.
#[derive(Debug)]
pub struct Shared<T>(Mutex<HashMap<Vmid, Asked<T>>>);

/// Result of a look; empty until then.
type Asked<T> = Arc<OnceCell<Option<T>>>;

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self(Mutex::new(HashMap::new()))
    }
}

impl<T: Clone + Send + Sync + 'static> Shared<T> {
    /// Looks at a container, together with all who wait for the same; `None` when its turn does not come in
    /// time.
    pub async fn at(
        &self,
        looks: &Looks,
        vmid: Vmid,
        look: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        // Dropped after this caller's own share.
        let _tidy = Tidy { shared: self, vmid };
        let asked = Arc::clone(self.0.lock().entry(vmid).or_default());
        // If the future that looks is cancelled, the next waiter looks.
        let looked = asked.get_or_init(|| async {
            let turn = looks.turn(vmid).await;
            // Whoever asks from here on may want to know what changes after the look.
            self.begin(vmid, &asked);
            match turn {
                Some(turn) => on_thread(turn, look).await,
                None => None,
            }
        });
        looked.await.clone()
    }

    fn begin(&self, vmid: Vmid, asked: &Asked<T>) {
        let mut all = self.0.lock();
        if all.get(&vmid).is_some_and(|one| Arc::ptr_eq(one, asked)) {
            all.remove(&vmid);
        }
    }
}

/// Forgets a look that nobody waits for any more.
#[derive(Debug)]
struct Tidy<'a, T> {
    shared: &'a Shared<T>,
    vmid: Vmid,
}

impl<T> Drop for Tidy<'_, T> {
    fn drop(&mut self) {
        let mut all = self.shared.0.lock();
        if all.get(&self.vmid).is_some_and(|asked| Arc::strong_count(asked) == 1) {
            all.remove(&self.vmid);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    };

    use futures_util::{FutureExt, future::join_all};
    use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

    use super::*;

    fn vmid(number: u32) -> Vmid {
        Vmid::try_from(number).expect("in range")
    }

    /// A look that says when it begins, and lasts until it is told to end.
    fn held(begun: &UnboundedSender<()>) -> (impl FnOnce() + Send + 'static, mpsc::Sender<()>) {
        let (begun, (end, ends)) = (begun.clone(), mpsc::channel::<()>());
        let look = move || {
            begun.send(()).expect("the test waits");
            // The end of the sender is an end, too.
            ends.recv().ok();
        };
        (look, end)
    }

    async fn begins(begun: &mut UnboundedReceiver<()>) {
        timeout(Duration::from_secs(10), begun.recv()).await.expect("it begins").expect("a look");
    }

    #[tokio::test]
    async fn container_has_one_look_at_a_time_and_all_have_four() {
        let (looks, (begun, mut begins_at)) = (Looks::default(), unbounded_channel());
        let (first, end_first) = held(&begun);
        let mut ends = vec![end_first];
        let mut running = vec![tokio::spawn({
            let looks = looks.clone();
            async move { looks.at(vmid(100), first).await }
        })];
        begins(&mut begins_at).await;
        assert!(looks.turn(vmid(100)).now_or_never().is_none(), "it has its look");
        for number in 101..104 {
            let (look, end) = held(&begun);
            let looks = looks.clone();
            running.push(tokio::spawn(async move { looks.at(vmid(number), look).await }));
            ends.push(end);
            begins(&mut begins_at).await;
        }
        assert!(looks.turn(vmid(104)).now_or_never().is_none(), "there is no place left");
        drop(ends);
        assert!(
            join_all(running).await.into_iter().all(|ended| ended.is_ok_and(|it| it.is_some()))
        );
        assert_eq!(looks.places.available_permits(), LOOKS_MAX);
        assert_eq!(looks.at(vmid(100), || 7).await, Some(7));
    }

    #[tokio::test]
    async fn look_whose_caller_has_left_keeps_its_places() {
        let (looks, (begun, mut begins_at)) = (Looks::default(), unbounded_channel());
        let (look, end) = held(&begun);
        let caller = tokio::spawn({
            let looks = looks.clone();
            async move { looks.at(vmid(100), look).await }
        });
        begins(&mut begins_at).await;
        caller.abort();
        caller.await.expect_err("cancelled");
        assert_eq!(looks.places.available_permits(), LOOKS_MAX - 1);
        assert!(looks.turn(vmid(100)).now_or_never().is_none(), "the thread looks on");
        drop(end);
        assert_eq!(looks.at(vmid(100), || 7).await, Some(7));
    }

    #[tokio::test]
    async fn work_that_waits_for_a_disk_takes_one_place() {
        let (looks, (begun, mut begins_at)) = (Looks::default(), unbounded_channel());
        let (work, end) = held(&begun);
        let running = tokio::spawn({
            let looks = looks.clone();
            async move { looks.slow(work).await }
        });
        begins(&mut begins_at).await;
        assert!(looks.slow(|| ()).now_or_never().is_none(), "one at a time");
        assert_eq!(looks.places.available_permits(), LOOKS_MAX - 1);
        assert_eq!(looks.at(vmid(100), || 7).await, Some(7));
        drop(end);
        running.await.expect("no panic").expect("done");
    }

    #[tokio::test]
    async fn whoever_asks_before_a_look_begins_shares_it() {
        let (looks, shared) = (Looks::default(), Arc::new(Shared::default()));
        let count = Arc::new(AtomicUsize::new(0));
        let ask = || {
            let (looks, shared, count) = (looks.clone(), Arc::clone(&shared), Arc::clone(&count));
            async move {
                shared.at(&looks, vmid(100), move || count.fetch_add(1, Ordering::Relaxed)).await
            }
        };
        let turn = looks.turn(vmid(100)).await.expect("free");
        let mut waiting: Vec<_> = (0..50).map(|_| Box::pin(ask())).collect();
        assert!(waiting.iter_mut().all(|one| one.now_or_never().is_none()));
        // The one that waits for the turn leaves; another takes it over.
        drop(waiting.remove(0));
        drop(turn);
        assert_eq!(join_all(waiting).await, [Some(0); 49], "one look for all");
        assert_eq!(ask().await, Some(1), "what changes later is looked for again");
        assert!(shared.0.lock().is_empty());
        let turn = looks.turn(vmid(100)).await.expect("free");
        let mut waits = Box::pin(ask());
        assert!((&mut waits).now_or_never().is_none());
        drop((waits, turn));
        assert!(shared.0.lock().is_empty(), "nobody waits");
    }

    #[tokio::test(start_paused = true)]
    async fn place_that_does_not_come_is_not_waited_for_without_end() {
        let looks = Looks::default();
        let turn = looks.turn(vmid(100)).await.expect("free");
        assert_eq!(looks.at(vmid(100), || 7).await, None);
        assert_eq!(Shared::default().at(&looks, vmid(100), || 7).await, None);
        drop(turn);
        assert_eq!(looks.at(vmid(100), || 7).await, Some(7));
    }
}
