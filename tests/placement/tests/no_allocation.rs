//! A decision allocates nothing. A test binary of its own, because it brings an allocator.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use controller::placement::Look;

thread_local! {
    /// Counted by thread: what runs the tests allocates too, on another one, whenever it likes.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

#[expect(unsafe_code, reason = "an allocator cannot be had without")]
// SAFETY: every call is passed unchanged to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
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

/// The counter counts: without it, the test below could not fail.
#[test]
fn an_allocation_is_counted() {
    let before = ALLOCATIONS.get();
    let made = std::hint::black_box(Box::new(before));
    assert_eq!(ALLOCATIONS.get(), *made + 1);
}

#[test]
fn a_decision_allocates_nothing() {
    let snapshot = workload::SNAPSHOT.parse().expect("a name");
    for nodes in [1, 10, 100, 1000] {
        let mut fleet = workload::fleet(nodes);
        for look in [Look::default(), Look::All] {
            let before = ALLOCATIONS.get();
            let found = (0..1000).filter(|_| workload::decide(&mut fleet, &snapshot, look)).count();
            assert_eq!(ALLOCATIONS.get(), before, "{nodes} nodes, {look:?}");
            assert_eq!(found, 1000);
        }
    }
}
