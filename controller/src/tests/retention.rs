//! What the store keeps, and when it is removed, while the clock is wrong.

use proto::{name::RequestId, sandbox::v1::*};

use super::{events::settled, *};
use crate::store::Filter;

/// Longer than from one sweep to the next.
const SWEEP: Duration = Duration::from_mins(11);
const MONTHS: Duration = Duration::from_hours(60 * 24);

/// Returns the revisions of the events that are kept.
async fn kept(lab: &Lab) -> Vec<u64> {
    let page = lab.store.events(0, Filter::default(), 1000).await.expect("read");
    page.events.into_iter().map(|(revision, _)| revision).collect()
}

#[tokio::test(start_paused = true)]
async fn clock_that_is_ahead_for_a_while_removes_nothing_that_is_young() {
    let mut lab = Lab::new().await;
    lab.events.keep = Duration::from_hours(3);
    lab.start().await;
    let id = lab.create("r1").await.expect("made").id;
    let delete = DeleteSandboxRequest { id: id.clone() };
    lab.api().delete_sandbox(delete).await.expect("deleted");
    settled(&lab).await;
    let before = kept(&lab).await;
    assert!(before.len() > 3, "{before:?}");

    let (team, request) = ("red".parse().expect("team"), "r1".parse::<RequestId>());
    let request = request.expect("request_id");
    let check = async |lab: &Lab, what: &str| {
        let now = kept(lab).await;
        assert!(now.starts_with(&before), "{what}: {now:?}");
        let row = lab.store.by_request(&team, &request).await.expect("read");
        assert_eq!(row.map(|row| row.id.to_string()), Some(id.clone()), "{what}");
        assert_eq!(lab.get(&id).await.expect("known").phase(), Phase::Deleted, "{what}");
    };
    lab.set_ahead(MONTHS);
    tokio::time::sleep(SWEEP).await;
    check(&lab, "ahead").await;
    // What comes meanwhile is logged with the wrong time, and does not make that one right.
    let other = lab.create("r2").await.expect("made").id;
    settled(&lab).await;
    lab.start().await;
    tokio::time::sleep(SWEEP).await;
    check(&lab, "ahead over a restart").await;
    lab.set_ahead(Duration::ZERO);
    tokio::time::sleep(SWEEP).await;
    check(&lab, "set back").await;
    for ahead in [MONTHS, Duration::from_hours(2 * 24)] {
        lab.set_ahead(ahead);
        lab.start().await;
        lab.set_ahead(Duration::ZERO);
        tokio::time::sleep(SWEEP).await;
        check(&lab, "ahead at a start").await;
    }
    assert_eq!(lab.get(&other).await.expect("known").phase(), Phase::Running);

    // By a clock that is right, what is old goes.
    tokio::time::sleep(Duration::from_hours(5)).await;
    let now = kept(&lab).await;
    assert!(!now.contains(&before[0]), "{now:?}");
}
