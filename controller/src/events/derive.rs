//! Derives the events between the known state of a sandbox and the one that its node reports. Pure,
//! and the only place with these rules.

use proto::{
    Cause,
    sandbox::v1::{EventKind, ExpiryAction, HttpService, Lifetime, Phase, Sandbox, WakeOn},
};

use crate::store::Why;

/// An event, as far as the sandbox itself shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Kind of the event.
    pub kind: EventKind,
    /// Reason, a constant; empty where the sandbox has none.
    pub why: Why,
    /// Details for people; may be empty.
    pub detail: String,
    /// Whether no caller requested it.
    pub unasked: bool,
}

/// Returns the events between the known state `old` and `new`; without `old` the sandbox was found.
///
/// A node may have passed through more phases in between; only what the states show is derived.
pub fn derive(old: Option<&Sandbox>, new: &Sandbox) -> Vec<Change> {
    let Some(old) = old else {
        return if living(new) { vec![found(new)] } else { Vec::new() };
    };
    let mut changes = Vec::new();
    if let Some(kind) = of_phase(old, new) {
        let failure = new.failure.as_ref().filter(|failure| old.failure.as_ref() != Some(*failure));
        let mut why = Why::from(new.cause());
        if why == Why::Unsaid {
            why = failure.map(|failure| failure.reason().into()).unwrap_or_default();
        }
        // The number, not its name: a cause of a later version is no request either. An operator
        // asks for these two.
        let asked = new.cause == 0 || matches!(new.cause(), Cause::Released | Cause::NodeLost);
        changes.push(Change {
            kind,
            unasked: !asked,
            why,
            detail: failure.map(|failure| failure.message.clone()).unwrap_or_default(),
        });
    }
    if living(new) {
        changes.extend(of_services(&old.services, &new.services));
        changes.extend(of_wake_on(old.wake_on, new.wake_on));
        changes.extend(of_lifetime(old, new));
        changes.extend(of_size(old, new));
    }
    changes
}

fn living(sandbox: &Sandbox) -> bool {
    !sandbox.phase().has_ended()
}

fn found(sandbox: &Sandbox) -> Change {
    let phase = sandbox.phase().as_str_name().trim_start_matches("PHASE_").to_lowercase();
    Change {
        kind: EventKind::Found,
        why: Why::Unsaid,
        detail: format!("its node reports it as {phase}"),
        unasked: true,
    }
}

fn of_phase(old: &Sandbox, new: &Sandbox) -> Option<EventKind> {
    let (before, booted) = (old.phase(), new.boot > old.boot);
    match new.phase() {
        Phase::Running => match before {
            Phase::Creating => Some(EventKind::Created),
            Phase::Paused if !booted => Some(EventKind::Resumed),
            Phase::Starting | Phase::Stopped => Some(EventKind::Started),
            Phase::Unspecified
            | Phase::Running
            | Phase::Stopping
            | Phase::Paused
            | Phase::Deleting
            | Phase::Deleted
            | Phase::Failed
            | Phase::Unreachable => booted.then_some(EventKind::Started),
        },
        Phase::Paused => (before != Phase::Paused).then_some(EventKind::Paused),
        Phase::Stopped => (before != Phase::Stopped).then_some(EventKind::Stopped),
        Phase::Deleted => (before != Phase::Deleted).then_some(EventKind::Deleted),
        Phase::Failed => (before != Phase::Failed).then_some(EventKind::CreateFailed),
        // Transitional phases: the phase at the end has an event.
        Phase::Unspecified
        | Phase::Creating
        | Phase::Starting
        | Phase::Stopping
        | Phase::Deleting
        | Phase::Unreachable => None,
    }
}

fn of_services(old: &[HttpService], new: &[HttpService]) -> Vec<Change> {
    let named = |of: &[HttpService], other: &[HttpService]| -> Vec<String> {
        let in_other = |service: &HttpService| {
            other.iter().any(|o| o.name == service.name && o.port == service.port)
        };
        let only = of.iter().filter(|service| !in_other(service));
        only.map(|service| format!("{} (port {})", service.name, service.port)).collect()
    };
    [(EventKind::Hidden, named(old, new)), (EventKind::Exposed, named(new, old))]
        .into_iter()
        .filter(|(_, services)| !services.is_empty())
        .map(|(kind, services)| Change {
            kind,
            why: Why::Unsaid,
            detail: services.join(", "),
            unasked: false,
        })
        .collect()
}

fn of_wake_on(old: Option<WakeOn>, new: Option<WakeOn>) -> Option<Change> {
    // A missing old value counts as unchanged.
    let (old, new) = (old?, new?);
    let switch = |name: &str, on: bool| format!("{name} {}", if on { "on" } else { "off" });
    (old != new).then(|| Change {
        kind: EventKind::WakeOnSet,
        why: Why::Unsaid,
        detail: [switch("http", new.http), switch("ssh", new.ssh), switch("exec", new.exec)]
            .join(", "),
        unasked: false,
    })
}

fn of_lifetime(old: &Sandbox, new: &Sandbox) -> Option<Change> {
    // A missing old value counts as unchanged. An expiry that a resume restarts is no change.
    let (before, now) = (old.lifetime.as_ref()?, new.lifetime.as_ref()?);
    let extended = old.expires_at != new.expires_at && old.phase() == new.phase();
    let rule = |what: &str, time: Option<prost_types::Duration>, action: ExpiryAction| {
        let action = action.as_str_name().trim_start_matches("EXPIRY_ACTION_").to_lowercase();
        match time.map_or(0, |time| time.seconds) {
            0 => format!("{what} never"),
            seconds => format!("{what} {seconds} s ({action})"),
        }
    };
    // An agent of an earlier version does not say that CPU use is not looked at.
    let complete = |rules: &Lifetime| Lifetime { idle_cpu: Some(rules.idle_cpu()), ..*rules };
    let cpu = match now.idle_cpu() {
        0 => String::new(),
        percent => format!(", idle below {percent} % of a core"),
    };
    (complete(before) != complete(now) || extended).then(|| Change {
        kind: EventKind::LifetimeSet,
        why: Why::Unsaid,
        detail: [rule("ttl", now.ttl, now.ttl_action()), rule("idle", now.idle, now.idle_action())]
            .join(", ")
            + &cpu,
        unasked: false,
    })
}

fn of_size(old: &Sandbox, new: &Sandbox) -> Option<Change> {
    // A missing old value counts as unchanged. A creation settles the size with its first phase.
    let (before, now) = (old.size?, new.size?);
    let settled = old.phase() == Phase::Creating;
    let disk = (now.disk_gib > 0).then(|| format!(", {} GiB disk", now.disk_gib));
    (before != now && !settled).then(|| Change {
        kind: EventKind::Resized,
        why: Why::Unsaid,
        detail: format!(
            "{} cores, {} MiB{}",
            now.cpu_cores,
            now.memory_mib,
            disk.unwrap_or_default()
        ),
        unasked: false,
    })
}

#[cfg(test)]
mod tests {
    use proto::sandbox::v1::{Failure, Lifetime, Size};

    use super::*;

    fn sandbox(phase: Phase, boot: u32) -> Sandbox {
        Sandbox { phase: phase.into(), boot, ..Sandbox::default() }
    }

    fn kinds(old: &Sandbox, new: &Sandbox) -> Vec<EventKind> {
        derive(Some(old), new).into_iter().map(|change| change.kind).collect()
    }

    #[test]
    fn derives_the_event_of_each_phase_change() {
        use EventKind as E;
        use Phase as P;
        let ways = [
            (P::Creating, 0, P::Running, 1, Some(E::Created)),
            (P::Creating, 0, P::Failed, 0, Some(E::CreateFailed)),
            (P::Running, 1, P::Running, 1, None),
            (P::Running, 1, P::Running, 2, Some(E::Started)),
            (P::Running, 1, P::Paused, 1, Some(E::Paused)),
            (P::Paused, 1, P::Running, 1, Some(E::Resumed)),
            (P::Paused, 1, P::Running, 2, Some(E::Started)),
            (P::Paused, 1, P::Stopped, 1, Some(E::Stopped)),
            (P::Running, 1, P::Stopping, 1, None),
            (P::Stopping, 1, P::Stopped, 1, Some(E::Stopped)),
            // A stop that did not happen.
            (P::Stopping, 1, P::Running, 1, None),
            (P::Stopped, 1, P::Starting, 1, None),
            (P::Starting, 1, P::Running, 2, Some(E::Started)),
            (P::Stopped, 1, P::Running, 2, Some(E::Started)),
            (P::Running, 1, P::Deleting, 1, None),
            (P::Deleting, 1, P::Deleted, 1, Some(E::Deleted)),
            (P::Deleted, 1, P::Deleted, 1, None),
            // Only the intent was known: running is as expected.
            (P::Unreachable, 1, P::Running, 1, None),
            (P::Unreachable, 1, P::Deleted, 1, Some(E::Deleted)),
        ];
        for (before, was, after, is, expected) in ways {
            let got = kinds(&sandbox(before, was), &sandbox(after, is));
            assert_eq!(got, Vec::from_iter(expected), "{before:?} {was} -> {after:?} {is}");
        }
    }

    #[test]
    fn unknown_sandbox_is_found_unless_it_has_ended() {
        let [found] = derive(None, &sandbox(Phase::Stopped, 1)).try_into().expect("one");
        assert_eq!(
            (found.kind, found.detail.as_str()),
            (EventKind::Found, "its node reports it as stopped")
        );
        assert_eq!(derive(None, &sandbox(Phase::Deleted, 1)), []);
        assert_eq!(derive(None, &sandbox(Phase::Failed, 1)), []);
    }

    #[test]
    fn failure_is_in_one_event_with_its_phase() {
        let mut stopped = sandbox(Phase::Stopped, 1);
        let reason = proto::Reason::FreezeFailed.into();
        let message = "it did not freeze and was stopped".to_owned();
        stopped.failure = Some(Failure { reason, message, rollback: String::new() });
        let [change] = derive(Some(&sandbox(Phase::Running, 1)), &stopped).try_into().expect("one");
        assert_eq!(
            (change.kind, change.why),
            (EventKind::Stopped, Why::Reason(proto::Reason::FreezeFailed))
        );
        // The failure is still in the record after the next start, which is unrelated to it.
        let running = Sandbox { failure: stopped.failure.clone(), ..sandbox(Phase::Running, 2) };
        let [change] = derive(Some(&stopped), &running).try_into().expect("one");
        assert_eq!((change.kind, change.why), (EventKind::Started, Why::Unsaid));
    }

    #[test]
    fn derives_causes_and_lifetime_changes() {
        let running = sandbox(Phase::Running, 1);
        let paused = Sandbox { cause: Cause::Idle.into(), ..sandbox(Phase::Paused, 1) };
        let [change] = derive(Some(&running), &paused).try_into().expect("one");
        assert_eq!((change.why, change.unasked), (Why::Cause(Cause::Idle), true));
        let [change] = derive(Some(&running), &sandbox(Phase::Paused, 1)).try_into().expect("one");
        assert_eq!((change.why, change.unasked), (Why::Unsaid, false));
        let later = Sandbox { cause: 99, ..sandbox(Phase::Paused, 1) };
        let [change] = derive(Some(&running), &later).try_into().expect("one");
        assert_eq!((change.why, change.unasked), (Why::Unsaid, true), "of a later version");
        let with = |seconds: i64, expires: i64| Sandbox {
            lifetime: Some(Lifetime {
                ttl: Some(prost_types::Duration { seconds, nanos: 0 }),
                ttl_action: ExpiryAction::Stop.into(),
                ..Lifetime::default()
            }),
            expires_at: Some(prost_types::Timestamp { seconds: expires, nanos: 0 }),
            ..sandbox(Phase::Running, 1)
        };
        assert_eq!(kinds(&with(60, 100), &with(60, 100)), []);
        let [change] = derive(Some(&with(60, 100)), &with(90, 130)).try_into().expect("one");
        assert_eq!(change.detail, "ttl 90 s (stop), idle never");
        assert_eq!(kinds(&with(60, 100), &with(60, 150)), [EventKind::LifetimeSet], "extended");
        let mut newer = with(60, 100);
        newer.lifetime.get_or_insert_default().idle_cpu = Some(0);
        assert_eq!(kinds(&with(60, 100), &newer), [], "an agent that was upgraded");
        let resumed = with(60, 200);
        let paused = Sandbox { phase: Phase::Paused.into(), ..with(60, 100) };
        assert_eq!(kinds(&paused, &resumed), [EventKind::Resumed]);
        assert_eq!(kinds(&running, &with(60, 100)), [], "the first word on it");
    }

    #[test]
    fn derives_the_event_of_a_new_size_after_the_creation() {
        let with = |phase, memory_mib, disk_gib| Sandbox {
            size: Some(Size { cpu_cores: 2, memory_mib, disk_gib }),
            ..sandbox(phase, 1)
        };
        let running = with(Phase::Running, 512, 0);
        assert_eq!(kinds(&running, &running), []);
        let [change] =
            derive(Some(&running), &with(Phase::Running, 1024, 9)).try_into().expect("1");
        assert_eq!(change.kind, EventKind::Resized);
        assert_eq!(change.detail, "2 cores, 1024 MiB, 9 GiB disk");
        let creating = with(Phase::Creating, 512, 0);
        assert_eq!(kinds(&creating, &with(Phase::Running, 512, 8)), [EventKind::Created]);
        assert_eq!(kinds(&sandbox(Phase::Running, 1), &running), [], "the first word on it");
    }

    #[test]
    fn derives_events_of_services_and_wake_on() {
        let service =
            |name: &str, port| HttpService { name: name.into(), port, ..HttpService::default() };
        let with = |services: &[HttpService], http| Sandbox {
            services: services.to_vec(),
            wake_on: Some(WakeOn { http, ssh: false, exec: true }),
            ..sandbox(Phase::Running, 1)
        };
        let (web, api) = (service("web", 8080), service("api", 9000));
        let both = with(&[web.clone(), api.clone()], true);
        let changes = derive(Some(&with(&[], true)), &both);
        let told: Vec<_> = changes.iter().map(|c| (c.kind, c.detail.as_str())).collect();
        assert_eq!(told, [(EventKind::Exposed, "web (port 8080), api (port 9000)")]);
        // Same name, another port.
        let changes = derive(Some(&both), &with(&[service("web", 81), api], false));
        let told: Vec<_> = changes.iter().map(|c| (c.kind, c.detail.as_str())).collect();
        let expected = [
            (EventKind::Hidden, "web (port 8080)"),
            (EventKind::Exposed, "web (port 81)"),
            (EventKind::WakeOnSet, "http off, ssh off, exec on"),
        ];
        assert_eq!(told, expected);
        // A deletion implies that its ports are closed.
        assert_eq!(kinds(&both, &sandbox(Phase::Deleted, 1)), [EventKind::Deleted]);
        // The first report of wake_on.
        let silent = Sandbox { wake_on: None, ..with(&[], true) };
        assert_eq!(kinds(&silent, &with(&[], false)), []);
    }
}
