//! Decides what becomes of a DNS record. Pure.

use super::{
    MARK,
    api::model::{Cname, Record},
    ids::{TARGETS, TunnelId},
};

/// Types that stand in the way of a CNAME of the same name.
const IN_THE_WAY: &[&str] = &["A", "AAAA", "CNAME"];

/// Change that makes the record of a name right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// The record is right.
    Keep,
    /// There is none.
    Create,
    /// One record is replaced.
    Replace(Record),
    /// Records that are none of ours go, and a new one comes: the operator has said so.
    Evict(Vec<Record>),
    /// The records of somebody else stay.
    Refuse(Vec<Record>),
}

/// Longest comment that every plan of Cloudflare takes, characters.
const COMMENT_MAX: usize = 100;

/// Returns the record that leads a name to a tunnel.
pub fn wanted(name: &str, tunnel: &TunnelId, tunnel_name: &str) -> Cname {
    let comment = format!("{MARK}: leads to the tunnel {tunnel_name}");
    Cname {
        kind: "CNAME",
        name: name.to_owned(),
        content: tunnel.target(),
        proxied: true,
        ttl: 1,
        comment: comment.chars().take(COMMENT_MAX).collect(),
    }
}

/// Returns true for a record that we have made.
pub fn is_ours(record: &Record) -> bool {
    record.comment.as_deref().is_some_and(|comment| comment.starts_with(MARK))
}

/// Returns true for a record that leads to the tunnel.
pub fn is_right(record: &Record, tunnel: &TunnelId) -> bool {
    record.proxied && tunnel_of(record).as_ref() == Some(tunnel)
}

/// Returns the tunnel that a record leads to; `None` for any other record.
pub fn tunnel_of(record: &Record) -> Option<TunnelId> {
    let content = record.content.trim_end_matches('.').to_ascii_lowercase();
    let id = content.strip_suffix(TARGETS)?.strip_suffix('.')?;
    id.parse().ok().filter(|_| record.kind == "CNAME")
}

/// Decides. `tunnel` is `None` while it is still to be made: then no record is right.
pub fn plan(existing: &[Record], tunnel: Option<&TunnelId>, replace: bool) -> Plan {
    let there: Vec<_> =
        existing.iter().filter(|record| IN_THE_WAY.contains(&record.kind.as_str())).collect();
    match there.as_slice() {
        [] => Plan::Create,
        [one] if tunnel.is_some_and(|tunnel| is_right(one, tunnel)) => Plan::Keep,
        [one] if is_ours(one) && one.kind == "CNAME" => Plan::Replace((*one).clone()),
        all if replace => Plan::Evict(all.iter().map(|record| (*record).clone()).collect()),
        all => Plan::Refuse(all.iter().map(|record| (*record).clone()).collect()),
    }
}

/// Says what a record is, for people.
pub fn shown(record: &Record) -> String {
    let Record { kind, name, content, comment, .. } = record;
    let proxied = if record.proxied { "proxied" } else { "not proxied" };
    let comment = comment.as_deref().filter(|comment| !comment.is_empty());
    let comment = comment.map(|comment| format!(", comment {comment:?}")).unwrap_or_default();
    let what = if content.ends_with(TARGETS) { ", another tunnel" } else { "" };
    format!("{name} is {kind} {content} ({proxied}{what}{comment})")
}

/// Decides whether a teardown removes a record: it carries our mark, and leads to this tunnel.
pub fn is_removed(record: &Record, tunnel: &TunnelId) -> bool {
    is_ours(record) && tunnel_of(record).as_ref() == Some(tunnel)
}

/// Returns true for a record by which a node publishes the controller through the tunnel: ours, and not that of the
/// sandboxes.
pub fn is_of_controller(record: &Record, tunnel: &TunnelId) -> bool {
    is_removed(record, tunnel) && !record.name.starts_with("*.")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tunnel() -> TunnelId {
        "f70ff985-a4ef-4643-bbbc-4a0ed4fc8415".parse().expect("an id")
    }

    fn record(kind: &str, content: &str, comment: &str) -> Record {
        Record {
            id: "r1".into(),
            kind: kind.into(),
            name: "*.example.com".into(),
            content: content.into(),
            proxied: true,
            comment: Some(comment.into()),
        }
    }

    #[test]
    fn right_record_is_kept_whoever_made_it() {
        let target = tunnel().target();
        for comment in ["", "pve-sandbox: made for x"] {
            let right = record("CNAME", &target, comment);
            assert_eq!(plan(&[right], Some(&tunnel()), false), Plan::Keep);
        }
        let dotted = record("CNAME", &format!("{}.", target.to_uppercase()), "");
        assert_eq!(plan(&[dotted], Some(&tunnel()), false), Plan::Keep);
        let text = record("TXT", "v=spf1", "");
        assert_eq!(plan(&[text], Some(&tunnel()), false), Plan::Create, "a TXT is in nobody's way");
        assert_eq!(plan(&[], None, false), Plan::Create);
    }

    #[test]
    fn our_own_record_is_corrected_and_anothers_is_refused() {
        let other = "00000000-a4ef-4643-bbbc-4a0ed4fc8415.cfargotunnel.com";
        let ours = record("CNAME", other, "pve-sandbox: made for x");
        assert_eq!(
            plan(std::slice::from_ref(&ours), Some(&tunnel()), false),
            Plan::Replace(ours.clone())
        );
        assert_eq!(plan(std::slice::from_ref(&ours), None, false), Plan::Replace(ours));
        let unproxied =
            Record { proxied: false, ..record("CNAME", &tunnel().target(), "pve-sandbox") };
        let planned = plan(std::slice::from_ref(&unproxied), Some(&tunnel()), false);
        assert_eq!(planned, Plan::Replace(unproxied));
        for foreign in [
            record("CNAME", other, "mine"),
            record("A", "192.0.2.1", ""),
            record("AAAA", "::1", ""),
        ] {
            let all = vec![foreign];
            assert_eq!(plan(&all, Some(&tunnel()), false), Plan::Refuse(all.clone()));
            assert_eq!(plan(&all, Some(&tunnel()), true), Plan::Evict(all.clone()));
        }
        let both = [record("A", "192.0.2.1", "pve-sandbox"), record("AAAA", "::1", "")];
        assert_eq!(plan(&both, Some(&tunnel()), false), Plan::Refuse(both.to_vec()));
    }

    #[test]
    fn teardown_removes_only_marked_records_of_the_tunnel() {
        let target = tunnel().target();
        assert!(is_removed(&record("CNAME", &target, "pve-sandbox: made for x"), &tunnel()));
        assert!(!is_removed(&record("CNAME", &target, "mine"), &tunnel()));
        assert!(!is_removed(&record("CNAME", "x.cfargotunnel.com", "pve-sandbox"), &tunnel()));
        assert!(!is_removed(&record("A", "192.0.2.1", "pve-sandbox"), &tunnel()));
    }

    #[test]
    fn record_of_somebody_else_is_told_with_what_it_is() {
        let text = shown(&record("CNAME", "x.cfargotunnel.com", "blog"));
        assert_eq!(
            text,
            "*.example.com is CNAME x.cfargotunnel.com (proxied, another tunnel, comment \"blog\")"
        );
    }
}
