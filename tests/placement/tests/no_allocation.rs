//! A decision allocates nothing. Separate test binary, because it counts allocations globally.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicU64, Ordering},
};

use controller::placement::Look;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

#[expect(unsafe_code, reason = "an allocator cannot be had without")]
// SAFETY: every call is passed unchanged to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's guarantees are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's guarantees are passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_decision_allocates_nothing() {
    let snapshot = workload::SNAPSHOT.parse().expect("a name");
    for nodes in [1, 10, 100, 1000] {
        let mut fleet = workload::fleet(nodes);
        for look in [Look::default(), Look::All] {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            let found = (0..1000).filter(|_| workload::decide(&mut fleet, &snapshot, look)).count();
            assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), before, "{nodes} nodes, {look:?}");
            assert_eq!(found, 1000);
        }
    }
}
